"""Charts of a calibration: observed scores compared with the null distribution.

Axes: N reference scores, M observed scores, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

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
from bh_routing.results.calibration_file import NEEDED, Array, read_calibration

PANELS_A_PAGE: Final = 8
PANELS_IN_HTML: Final = 4
_NUM_BINS: Final = 40
_NUM_P_BINS: Final = 20
_NUM_QUANTILES: Final = 60
Floats = NDArray[np.float64]

_NORMAL: Final = "gaussian"
NORMAL_QUANTILES: Final = 20_000
"""Number of quantiles that represent N(0, 1), which has no table."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NullSample:
    """Reference and observed scores of one panel: of a layer or, for slots, of all layers."""

    label: str
    """Layer, or statistic of the slots."""
    reference_N: Floats
    """Ascending; for a per-expert null distribution, the tables of all experts pooled."""
    observed_M: Floats
    p_M: Floats
    """p-value of each observed score, from its own expert's table if there is one."""

    @property
    def fraction_below_05(self) -> float:
        """Fraction of observed scores with p <= 0.05; 0.05 under the null distribution."""
        return float(np.mean(self.p_M <= 0.05))


def read_null_samples(path: str | Path) -> dict[str, tuple[NullSample, ...]]:
    """Read reference and observed scores of every null distribution in a calibration file.

    Args:
        path: the safetensors file that `bh-routing calibrate` wrote.
    Returns:
        Null distribution -> panels; only those with observed scores, which schema 2 lacks.
    Raises:
        CalibrationError: the file is missing or invalid.
    """
    file = read_calibration(Path(path))
    samples = {
        null: tuple(
            _of_layer(null, layer, scores_TE, tables[layer] if tables else None)
            for layer, scores_TE in enumerate(observed)
        )
        for null, observed in file.observed.items()
        if (tables := file.tables.get(null)) or null == _NORMAL
    }
    return samples | _of_slots(file.contributions)


def _of_layer(null: str, layer: int, scores_TE: Array, table: Array | None) -> NullSample:
    label, observed_TE = f"layer {layer}", scores_TE.astype(np.float64)
    if table is None:
        places = (np.arange(NORMAL_QUANTILES) + 0.5) / NORMAL_QUANTILES
        return NullSample(
            label=label,
            reference_N=stats.norm.ppf(places),
            observed_M=observed_TE.ravel(),
            p_M=stats.norm.sf(observed_TE.ravel()),
        )
    reference = table.astype(np.float64)
    if reference.ndim == 1:
        p_M = upper_tail(observed_TE.ravel(), reference)
    else:
        by_expert = zip(observed_TE.T, reference, strict=True)
        p_M = np.stack([upper_tail(scores, table) for scores, table in by_expert], axis=-1).ravel()
    return NullSample(
        label=label,
        reference_N=np.sort(reference, axis=None),
        observed_M=observed_TE.ravel(),
        p_M=p_M,
    )


def _of_slots(arrays: Mapping[str, Array]) -> dict[str, tuple[NullSample, ...]]:
    """Pair slots that mattered with all slots, by statistic: the scores that BH-drop compares."""
    found: dict[str, list[NullSample]] = {}
    for name, table_N in sorted(arrays.items()):
        kind, *words = name.split(".")
        if kind != "needed" or (every := arrays.get(f"all.{words[0]}")) is None:
            continue
        needed_N, all_M = table_N.astype(np.float64), every.astype(np.float64)
        sample = NullSample(
            label=words[0],
            reference_N=needed_N,
            observed_M=all_M,
            p_M=upper_tail(-all_M, -needed_N[::-1]),  # here small scores are extreme
        )
        found.setdefault(NEEDED[words[1]], []).append(sample)
    return {null: tuple(panels) for null, panels in found.items()}


def upper_tail(scores_M: Floats, sorted_N: Floats) -> Floats:
    """Return (1 + #{reference >= s}) / (N + 1)."""
    below_M = np.searchsorted(sorted_N, scores_M, side="left")
    tail: Floats = (1 + sorted_N.size - below_M) / (sorted_N.size + 1)
    return tail


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
    is_slots = null in NEEDED.values()
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
    what = "slots" if null in NEEDED.values() else "scores"
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
