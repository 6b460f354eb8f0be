"""Charts of a calibration: observed scores compared with the null distribution.

Axes: N reference scores, M observed scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter
from scipy.special import expit

from bh_routing.analysis.null_samples import NullSample, read_null_samples
from bh_routing.errors import CalibrationError
from bh_routing.report.charts.chart import Chart
from bh_routing.report.charts.style import (
    BASELINE,
    BLUE,
    SOFT,
    WIDTH_INCHES,
    Picture,
    look,
    new_figure,
    save,
    set_title,
)
from bh_routing.report.text import percent

PANELS_A_PAGE: Final = 8
PANELS_IN_HTML: Final = 4
_NUM_BINS: Final = 40
_NUM_P_BINS: Final = 20
_NUM_QUANTILES: Final = 60
_SLOTS: Final = ("needed", "needed_by_loss")


def null_charts(path: str | Path) -> dict[str, Chart]:
    """Make one chart per null distribution of a calibration file, for layers across the depth.

    Raises:
        CalibrationError: the file isn't a calibration, or an old one without observed scores.
    """
    charts = {}
    for null, panels in _samples(path).items():
        some = np.unique(np.linspace(0, len(panels) - 1, PANELS_IN_HTML).round().astype(int))
        shares = (
            (p.label, percent(p.fraction_below_05, 1), f"{p.reference_N.size:,}") for p in panels
        )
        charts[null] = Chart(
            finding=finding(null, panels),
            description=(
                "Left: density of reference scores (grey) and observed scores (blue). Middle: "
                "density of p-values, 1 (dashed) under the null. Right: observed against reference "
                "quantiles, equal on the dashed line."
            ),
            views={"": partial(draw_null, null, [panels[i] for i in some])},
            table=[("scores", "observed with p ≤ 0.05", "reference scores"), *shares],
        )
    return charts


def plot_calibration(path: str | Path, folder: str | Path) -> list[Path]:
    """Draw one page per null distribution: for each layer densities, p-values and quantiles.

    Args:
        path: the safetensors file that `bh-routing calibrate` wrote.
        folder: output folder for `calibration_<null>.png`; more than `PANELS_A_PAGE` layers are
            split over several pages.
    Returns:
        Paths of the pages.
    Raises:
        CalibrationError: the file isn't a calibration, or an old one without observed scores.
    """
    written = []
    for null, panels in _samples(path).items():
        for number, first in enumerate(range(0, len(panels), PANELS_A_PAGE), start=1):
            suffix = f"_{number}" if len(panels) > PANELS_A_PAGE else ""
            with look():
                figure = draw_null(null, panels[first : first + PANELS_A_PAGE])
                set_title(figure, finding(null, panels))
            written.append(save(figure, Path(folder) / f"calibration_{null}{suffix}.png"))
    return written


def _samples(path: str | Path) -> Mapping[str, Sequence[NullSample]]:
    samples = read_null_samples(path)
    if not samples:
        raise CalibrationError(
            f"calibration {path} holds no observed scores, which files have since schema 3; "
            "calibrate again with this version"
        )
    return samples


def draw_null(null: str, panels: Sequence[NullSample]) -> Picture:
    """Draw one row of three plots per panel."""
    is_slots = null in _SLOTS
    figure, grid = new_figure(
        0.9 + 1.5 * len(panels), width_inches=1.15 * WIDTH_INCHES, nrows=len(panels), ncols=3,
        squeeze=False, width_ratios=(1.5, 1, 1),
    )  # fmt: skip
    for panel, (density, histogram, quantiles) in zip(panels, grid, strict=True):
        _draw_density(density, panel, is_log=is_slots)
        _draw_p_values(histogram, panel)
        _draw_quantiles(quantiles, panel, is_log=is_slots)
    titles = (("Density of scores", "Score"), ("Density of p-values", "p-value"),
              ("Quantiles", "Reference"))  # fmt: skip
    for top, bottom, (title, label) in zip(grid[0], grid[-1], titles, strict=True):
        top.set_title(title, loc="left")
        bottom.set_xlabel(label)
    handles, _ = grid[0][0].get_legend_handles_labels()
    reference = "slots that mattered" if is_slots else "the null distribution"
    seen = f"observed: {panels[0].observed_M.size:,} " + ("slots" if is_slots else "scores")
    figure.legend(handles, [f"reference: {reference}", seen], loc="outside lower left", ncols=2)
    return figure


def finding(null: str, panels: Sequence[NullSample]) -> str:
    """State in one sentence how far the observed scores are from the null distribution.

    Example:
        >>> import numpy as np
        >>> p = np.array([0.01, 0.04, 0.5, 0.9])
        >>> same = NullSample(label="layer 0", reference_N=p, observed_M=p, p_M=p)
        >>> finding("background", [same])
        'background: 50 % of all scores have p ≤ 0.05, 5 % if all came from the null'
    """
    shares = sorted(panel.fraction_below_05 for panel in panels)
    low, high = percent(shares[0]), percent(shares[-1])
    span = low if low == high else f"{low.removesuffix(' %')} to {high}"
    what = "slots" if null in _SLOTS else "scores"
    return f"{null}: {span} of all {what} have p ≤ 0.05, 5 % if all came from the null"


def _draw_density(axes: Any, panel: NullSample, *, is_log: bool) -> None:
    both = (panel.reference_N, panel.observed_M)
    ends = np.array([np.quantile(scores, (0.002, 0.998)) for scores in both])
    space = np.geomspace if is_log else np.linspace
    bins = space(ends[:, 0].min(), ends[:, 1].max(), _NUM_BINS + 1)
    # For log scores, density per log unit, so that equal bins on the axis are comparable.
    heights = [np.histogram(scores, bins)[0] / scores.size for scores in both]
    axes.stairs(heights[0], bins, fill=True, color=BASELINE, alpha=0.35, label="reference")
    axes.stairs(heights[1], bins, color=BLUE, linewidth=1.6, label="observed")
    if is_log:
        _make_log(axes, "x")
    axes.set_ylabel(panel.label)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _draw_p_values(axes: Any, panel: NullSample) -> None:
    edges = np.linspace(0.0, 1.0, _NUM_P_BINS + 1)
    heights = np.histogram(panel.p_M, edges)[0] / panel.p_M.size * _NUM_P_BINS
    axes.stairs(heights, edges, fill=True, color=BLUE, alpha=0.8)
    axes.axhline(1.0, color=SOFT, linestyle="--", linewidth=1.2)
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_locator(FixedLocator([0.0, 0.5, 1.0]))


def _draw_quantiles(axes: Any, panel: NullSample, *, is_log: bool) -> None:
    size = min(panel.reference_N.size, panel.observed_M.size)
    furthest = np.log(max(size, 3) - 1.0)
    places = expit(np.linspace(-furthest, furthest, _NUM_QUANTILES))  # even in log-odds: tails show
    expected, seen = (np.quantile(s, places) for s in (panel.reference_N, panel.observed_M))
    ends = [min(expected[0], seen[0]), max(expected[-1], seen[-1])]
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if is_log:
            _make_log(axes, name)
        else:
            axis.set_major_locator(MaxNLocator(3))
    axes.plot(ends, ends, color=SOFT, linestyle="--", linewidth=1.2)
    axes.plot(expected, seen, color=BLUE, marker=".", markersize=4, linestyle="none")
    axes.set_ylabel("Observed")


def _make_log(axes: Any, name: str) -> None:
    axes.set(**{f"{name}scale": "log"})
    axis = getattr(axes, f"{name}axis")
    axis.set_major_locator(LogLocator(numticks=4))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
