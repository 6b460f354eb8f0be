"""Loss against experts, one line a rule: who is below static top-k, and by how much."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from bh_routing.analysis.bootstrap import Floats
from bh_routing.report.quality_plot import percent_change
from bh_routing.report.style import (
    BASELINE_COLOUR,
    DPI,
    EDGE_COLOUR,
    FIXED_COLOURS,
    FIXED_MARKERS,
    OTHER_COLOURS,
    OTHER_MARKERS,
    new_figure,
    set_title,
)
from bh_routing.report.text import for_plot, number

PARETO_PLOT: Final = "pareto.png"
DOMAINS_PLOT: Final = "pareto_domains.png"
STATIC_LABEL: Final = "static top-k"
LOG_SPAN: Final = 8.0
"""From this ratio of largest to smallest loss on, a linear axis hides the small ones."""
LEAST_SAVED: Final = -40.0
"""A rule that saves less, in percent, is an arrow at the lower edge, with its number."""
_PALE: Final = "#f0e442"
_COLOURS: Final = tuple(
    c for c in (*FIXED_COLOURS.values(), *OTHER_COLOURS) if c not in (BASELINE_COLOUR, _PALE)
)
_MARKERS: Final = (*[m for m in FIXED_MARKERS.values() if m != "o"], *OTHER_MARKERS)
_LABEL_WIDTH: Final = 26


class Look(NamedTuple):
    """How a rule is drawn in every panel."""

    colour: str
    marker: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """One point of a line: losses in nats a token; NaN is unknown."""

    mean_experts: float
    delta_nll: float
    low: float
    high: float
    budget: float = math.nan
    """Mean experts that the knob was set for."""
    saved: float = math.nan
    """Share of static top-k's increase in perplexity saved at the same mean."""
    saved_low: float = math.nan
    saved_high: float = math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One rule over its budgets."""

    label: str
    marks: tuple[Mark, ...]
    is_static: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One set of axes."""

    title: str
    series: tuple[Series, ...]


def draw_pareto(panel: Panel, title: str) -> Figure:
    """Draw the increase in perplexity against mean experts, and what of it each rule saves.

    Above, static top-k is the grey line: below it is better. Intervals are each point's own.
    Below, the same points against static top-k at the same mean, its line being 0: the paired
    comparison, with intervals that hold for all points together.
    """
    figure = _blank(height=3.4 + 0.8 + max(2.1, 0.36 * len(panel.series)), width=6.4)
    above, below = figure.subplots(2, 1, height_ratios=[1.6, 1])
    looks = _looks([panel])
    _draw_losses([above], [panel], looks)
    _draw_saved(below, [one for one in panel.series if not one.is_static], looks)
    above.set_xlabel("Experts kept per token and layer")
    _name_lines(above, panel.series, looks)
    set_title(figure, title, width=58)
    return figure


def draw_domains(panels: Sequence[Panel], title: str) -> Figure:
    """Draw the increase in perplexity against mean experts, one domain beside another."""
    count = max(1, len(panels))
    rows = max((len(panel.series) for panel in panels), default=0)
    figure = _blank(height=max(4.3, 1.6 + 0.4 * rows), width=3.8 + 2.4 * count)
    grid = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    looks = _looks(panels)
    _draw_losses(grid, panels, looks)
    figure.supxlabel("Experts kept per token and layer", fontsize=11)
    if panels:
        _name_lines(grid[-1], panels[-1].series, looks)
    set_title(figure, title, width=32 * count)
    return figure


def _blank(height: float, width: float) -> Figure:
    figure, axes = new_figure(height, width_inches=width)
    axes.remove()
    return figure


def _looks(panels: Sequence[Panel]) -> dict[str, Look]:
    labels = dict.fromkeys(s.label for p in panels for s in p.series if not s.is_static)
    return {
        label: Look(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
        for i, label in enumerate(labels)
    }


def _draw_losses(grid: Sequence[Axes], panels: Sequence[Panel], looks: Mapping[str, Look]) -> None:
    is_log = _scale(grid[0], [series for panel in panels for series in panel.series])
    for axes, panel in zip(grid, panels, strict=False):
        for series in panel.series:
            _draw_series(axes, series, looks.get(series.label), is_log=is_log)
        axes.grid(axis="y")
        axes.set_title(for_plot(panel.title, 24), loc="left")
    grid[0].set_ylabel(f"Increase in perplexity (%{', log scale' if is_log else ''})")


def _scale(axes: Axes, series: Sequence[Series]) -> bool:
    """Choose the axes' limits and a log scale where losses differ by a large factor."""
    marks = [mark for one in series if not one.is_static for mark in _known(one)]
    marks = marks or [mark for one in series for mark in _known(one)]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not marks:
        return False
    means = [mark.mean_experts for mark in marks]
    left, right = min(means) - 0.25, max(means) + 0.25
    axes.set_xlim(left, right)
    static = [mark for one in series if one.is_static for mark in _known(one)]
    marks += [mark for mark in static if left <= mark.mean_experts <= right]
    lost = [percent_change(mark.delta_nll) for mark in marks]
    lost = [loss for loss in lost if loss != 0]
    is_log = bool(lost) and min(lost) > 0 and max(lost) / min(lost) > LOG_SPAN
    if is_log:
        axes.set_yscale("log")
        axes.set_ylim(0.6 * min(lost), 1.5 * max(lost))
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif lost:
        # By what is in sight: static top-k goes on to either side.
        ends = [percent_change(end) for mark in marks for end in (mark.low, mark.high)]
        seen = [0.0, 1.2 * max(lost), *(end for end in ends if math.isfinite(end))]
        axes.set_ylim(1.1 * min(seen), 1.1 * max(seen))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return is_log


def _known(series: Series) -> list[Mark]:
    known = [m for m in series.marks if math.isfinite(m.mean_experts + m.delta_nll)]
    return sorted(known, key=lambda mark: mark.mean_experts)


def _draw_series(axes: Axes, series: Series, look: Look | None, *, is_log: bool) -> None:
    # A loss of 0, as of the model's own top-k, has no place on a log scale.
    marks = [m for m in _known(series) if not is_log or m.delta_nll > 0]
    if not marks:
        return
    x_n = np.array([mark.mean_experts for mark in marks])
    y_n = np.array([percent_change(mark.delta_nll) for mark in marks])
    ends_2n = np.array([[percent_change(m.low), percent_change(m.high)] for m in marks]).T
    if look is None:
        axes.plot(x_n, y_n, color=BASELINE_COLOUR, linewidth=2.4, zorder=1)
        axes.fill_between(x_n, *ends_2n, color=BASELINE_COLOUR, alpha=0.15, linewidth=0)
        return
    axes.plot(x_n, y_n, color=look.colour, linewidth=1.2, zorder=2)
    _draw_marks(axes, x_n, y_n, ends_2n, look)


def _draw_saved(axes: Axes, rules: Sequence[Series], looks: Mapping[str, Look]) -> None:
    budgets = sorted({mark.budget for one in rules for mark in one.marks})
    is_far = False
    for slot, series in enumerate(rules):
        marks = [mark for mark in series.marks if math.isfinite(mark.saved)]
        offset = (slot - (len(rules) - 1) / 2) * 0.8 / len(rules)
        at_n = np.array([budgets.index(mark.budget) + offset for mark in marks])
        saved_n = np.array([100 * mark.saved for mark in marks])
        ends_2n = 100 * np.array([[m.saved_low, m.saved_high] for m in marks]).reshape(-1, 2).T
        # What loses far more than static top-k stands at the edge, and doesn't set the scale.
        near_n = saved_n > LEAST_SAVED
        ends_2n = np.maximum(ends_2n, LEAST_SAVED)
        look = looks[series.label]
        _draw_marks(axes, at_n[near_n], saved_n[near_n], ends_2n[:, near_n], look)
        is_far |= not near_n.all()
        for at, saved in zip(at_n[~near_n], saved_n[~near_n], strict=True):
            axes.annotate(
                number(saved, 0), (at, LEAST_SAVED - 8), xytext=(0, 14),
                textcoords="offset points", ha="center", fontsize=8, color=EDGE_COLOUR, rotation=90,
                arrowprops={"arrowstyle": "-|>", "color": look.colour, "shrinkA": 0},
            )  # fmt: skip
    if is_far:
        axes.set_ylim(bottom=LEAST_SAVED - 8)
    axes.axhline(0.0, color=BASELINE_COLOUR, linewidth=2.4, zorder=1)
    axes.set_xlim(-0.5, max(len(budgets), 1) - 0.5)
    axes.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    axes.set_xlabel("Budget of experts")
    axes.set_ylabel("Saved of static\ntop-k's increase (%)")


def _draw_marks(axes: Axes, x_n: Floats, y_n: Floats, ends_2n: Floats, look: Look) -> None:
    known_n = np.isfinite(ends_2n).all(axis=0)
    axes.vlines(x_n[known_n], *ends_2n[:, known_n], color=look.colour, linewidth=1.4, zorder=3)
    axes.plot(x_n, y_n, zorder=4, **_marker(look))


def _marker(look: Look) -> dict[str, Any]:
    return {
        "linestyle": "none", "marker": look.marker, "color": look.colour, "markersize": 7,
        "markeredgecolor": EDGE_COLOUR, "markeredgewidth": 0.7,
    }  # fmt: skip


def _name_lines(axes: Axes, series: Sequence[Series], looks: Mapping[str, Look]) -> None:
    """Write each name to the right of the axes, level with its line's end or moved for room."""
    to_axes = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    ends = []
    for one in series:
        shown = [m for m in _known(one) if m.delta_nll != 0 and m.mean_experts <= right]
        if shown:
            point = shown[-1].mean_experts, percent_change(shown[-1].delta_nll)
            ends.append((float(to_axes.transform(point)[1]), point, one))
    ends.sort(key=lambda end: end[0])
    names = [_wrapped(one.label) for _, _, one in ends]
    line = 0.2 / (axes.get_window_extent().height / DPI)
    sizes = [line * (1.3 + name.count("\n")) for name in names]
    heights = _spaced([end[0] for end in ends], sizes)
    for (_, point, one), name, at in zip(ends, names, heights, strict=True):
        look = looks.get(one.label)
        axes.annotate(
            "", point, xytext=(1.05, at), textcoords="axes fraction", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": look.colour if look else BASELINE_COLOUR,
                "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5,
            },
        )  # fmt: skip
        if look:
            axes.plot(1.07, at, transform=axes.transAxes, clip_on=False, **_marker(look))
        axes.text(
            1.105 if look else 1.06, at, name, transform=axes.transAxes, va="center", fontsize=9.5,
            color=EDGE_COLOUR, weight="normal" if look else "bold",
        )  # fmt: skip


def _wrapped(label: str) -> str:
    shown = for_plot(label, 3 * _LABEL_WIDTH)
    return textwrap.fill(shown, _LABEL_WIDTH, break_on_hyphens=False)


def _spaced(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Move sorted heights apart so that no two overlap, as a block around where they were."""
    at: list[float] = []
    for i, height in enumerate(wanted):
        floor = at[-1] + (sizes[i - 1] + sizes[i]) / 2 if at else -math.inf
        at.append(max(height, floor))
    if not at:
        return at
    shift = float(np.mean(wanted) - np.mean(at))
    low, high = at[0] - sizes[0] / 2, at[-1] + sizes[-1] / 2
    # Inside the axes where that is possible, from the top if it isn't.
    shift = min(max(shift, -low), 1.0 - high)
    return [height + shift for height in at]
