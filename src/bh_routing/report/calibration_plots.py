"""Pictures of a calibration: does what was observed look like the null it is compared with?

Axes: N reference scores, M observed scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.special import expit

from bh_routing.analysis.calibration_file import NullSample, read_calibration_samples
from bh_routing.errors import CalibrationError
from bh_routing.report.style import (
    BASELINE_COLOUR,
    FIXED_COLOURS,
    GUIDE_COLOUR,
    WIDTH_INCHES,
    look,
    new_figure,
    save,
    set_title,
)
from bh_routing.report.text import percent

PANELS_A_PAGE: Final = 8
_ROW_INCHES: Final = 1.6
_HEAD_INCHES: Final = 1.0
_OBSERVED: Final = FIXED_COLOURS["bh_strict"]
_NUM_BINS: Final = 40
_NUM_P_BINS: Final = 20
_SLOTS: Final = ("needed", "needed_by_loss")


def plot_calibration(path: str | Path, folder: str | Path) -> list[Path]:
    """Draw one page a null: per layer the two densities, a p-value histogram and a QQ plot.

    A null of more than `PANELS_A_PAGE` layers goes on over further pages.

    Args:
        path: the safetensors file that `bh-routing calibrate` wrote.
        folder: where the pages go, as `calibration_<null>.png`.
    Returns:
        Paths of the pages.
    Raises:
        CalibrationError: it is no calibration, or an old one without observed scores.
    """
    samples = read_calibration_samples(path).samples
    if not samples:
        raise CalibrationError(
            f"calibration {path} holds no observed scores, which files have since schema 3; "
            "calibrate again with this version"
        )
    written = []
    for null, panels in samples.items():
        for number, first in enumerate(range(0, len(panels), PANELS_A_PAGE), start=1):
            page = panels[first : first + PANELS_A_PAGE]
            suffix = f"_{number}" if len(panels) > PANELS_A_PAGE else ""
            with look():
                figure = draw_null(null, page)
            written.append(save(figure, Path(folder) / f"calibration_{null}{suffix}.png"))
    return written


def draw_null(null: str, panels: Sequence[NullSample]) -> Figure:
    """Draw one row of three plots a panel."""
    height = _HEAD_INCHES + _ROW_INCHES * len(panels)
    figure, only = new_figure(height, 1.6 * WIDTH_INCHES)
    only.remove()
    set_title(figure, finding(null, panels), width=84)
    grid = figure.subplots(len(panels), 3, squeeze=False, width_ratios=(1.5, 1, 1))
    is_slots = null in _SLOTS
    for panel, (density, histogram, quantiles) in zip(panels, grid, strict=True):
        _draw_density(density, panel, is_log=is_slots)
        _draw_p_values(histogram, panel)
        _draw_quantiles(quantiles, panel, is_log=is_slots)
    for axes, name in zip(
        grid[0], ("Density of scores", "Density of p-values", "Quantiles"), strict=True
    ):
        axes.set_title(name, loc="left")
    for axes, name in zip(grid[-1], ("Score", "p-value", "Reference"), strict=True):
        axes.set_xlabel(name)
    for row in grid:
        row[2].set_ylabel("Observed")
    handles, _ = grid[0][0].get_legend_handles_labels()
    what = "reference: slots that mattered" if is_slots else "reference: the null"
    seen = f"observed: {panels[0].observed_M.size:,} " + ("slots" if is_slots else "scores")
    figure.legend(handles, [what, seen], loc="outside lower left", ncols=2)
    return figure


def finding(null: str, panels: Sequence[NullSample]) -> str:
    """Say in one sentence how far the observed scores are from the null.

    Example:
        >>> import numpy as np
        >>> p = np.array([0.01, 0.04, 0.5, 0.9])
        >>> same = NullSample(label="layer 0", reference_N=p, observed_M=p, p_M=p)
        >>> finding("background", [same])
        'background: 50 % of all scores have p ≤ 0.05, 5 % if all came from the null'
    """
    shares = sorted(panel.share_below_05 for panel in panels)
    low, high = percent(shares[0]), percent(shares[-1])
    span = low if low == high else f"{low.removesuffix(' %')} to {high}"
    what = "slots" if null in _SLOTS else "scores"
    return f"{null}: {span} of all {what} have p ≤ 0.05, 5 % if all came from the null"


def _draw_density(axes: Any, panel: NullSample, *, is_log: bool) -> None:
    both = (panel.reference_N, panel.observed_M)
    ends = np.array([np.quantile(scores, (0.002, 0.998)) for scores in both])
    space = np.geomspace if is_log else np.linspace
    bins = space(ends[:, 0].min(), ends[:, 1].max(), _NUM_BINS + 1)
    # Of log scores, the density by log: equal bins on the axis are compared as they look.
    heights = [np.histogram(scores, bins)[0] / scores.size for scores in both]
    axes.stairs(heights[0], bins, fill=True, color=BASELINE_COLOUR, alpha=0.35, label="reference")
    axes.stairs(heights[1], bins, color=_OBSERVED, linewidth=1.6, label="observed")
    if is_log:
        _make_log(axes, "x")
    axes.set_ylabel(panel.label)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _draw_p_values(axes: Any, panel: NullSample) -> None:
    axes.hist(
        panel.p_M, np.linspace(0.0, 1.0, _NUM_P_BINS + 1), density=True, color=_OBSERVED, alpha=0.8
    )
    axes.axhline(1.0, color=GUIDE_COLOUR, linestyle="--", linewidth=1.2)
    axes.set_xlim(0.0, 1.0)
    axes.set_xticks([0.0, 0.5, 1.0])


def _draw_quantiles(axes: Any, panel: NullSample, *, is_log: bool) -> None:
    size = min(panel.reference_N.size, panel.observed_M.size)
    furthest = np.log(max(size, 3) - 1.0)
    places = expit(np.linspace(-furthest, furthest, 120))  # even in log-odds: both tails show
    expected, seen = (np.quantile(s, places) for s in (panel.reference_N, panel.observed_M))
    ends = [min(expected[0], seen[0]), max(expected[-1], seen[-1])]
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if is_log:
            _make_log(axes, name)
        else:
            axis.set_major_locator(MaxNLocator(3))
    axes.plot(ends, ends, color=GUIDE_COLOUR, linestyle="--", linewidth=1.2)
    axes.plot(expected, seen, color=_OBSERVED, marker=".", markersize=3, linestyle="none")


def _make_log(axes: Any, name: str) -> None:
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
