"""Bars with every prompt as a point beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bh_routing.report.style import EDGE_COLOUR, colours_of, new_figure, set_title, spread
from bh_routing.report.table import Experiments
from bh_routing.report.text import number, short_labels

BAR_HEIGHT = 0.42
BAR_OFFSET = -0.19
POINTS_OFFSET = 0.24


@dataclass(frozen=True, kw_only=True, slots=True)
class BarPlot:
    """What to show for each configuration."""

    column: str
    label: str
    """Text of the value axis, with its unit."""
    title: str
    """The finding."""
    digits: int = 2
    """Decimals of the numbers at the bars."""
    reference: str | None = None
    """A column whose mean is marked on each bar."""
    reference_label: str = ""


def draw_bars(table: Experiments, plot: BarPlot) -> Figure:
    """Draw one horizontal bar a configuration, first on top, with its prompts as points."""
    names = table.names
    figure, axes = new_figure(1.6 + 0.46 * len(names))
    colours = colours_of(names)
    longest = _longest(table, plot)
    for row, name in enumerate(names):
        values_n = table.values(name, plot.column)
        mean = table.mean(name, plot.column)
        mark = table.mean(name, plot.reference) if plot.reference else math.nan
        edge: dict[str, Any] = {"color": colours[name], "edgecolor": EDGE_COLOUR}
        if len(values_n):
            axes.barh(row + BAR_OFFSET, mean, BAR_HEIGHT, linewidth=0.6, **edge)
            at = row + POINTS_OFFSET + spread(len(values_n), 0.11)
            axes.scatter(values_n, at, s=13, linewidths=0.35, alpha=0.8, zorder=3, **edge)
        if math.isfinite(mark):
            _mark(axes, row + BAR_OFFSET, mark)
        shown = number(mean, plot.digits) if len(values_n) else "no value"
        # Behind the bar and its mark; the points have their own strip below.
        end = max([v for v in (mean, mark, 0.0) if math.isfinite(v)])
        axes.text(end + longest * 0.015, row + BAR_OFFSET, shown, va="center", fontsize=10.5)
    axes.set_xlim(0.0, longest * 1.14)
    axes.set_yticks(range(len(names)), short_labels(names))
    axes.set_ylim(len(names) - 0.5, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(plot.label)
    if plot.reference:
        _explain_mark(figure, axes, plot.reference_label)
    set_title(figure, plot.title)
    return figure


def _longest(table: Experiments, plot: BarPlot) -> float:
    """The largest value drawn; 1 where there is none, so that the axis still has a length."""
    columns = [plot.column] + ([plot.reference] if plot.reference else [])
    largest = float(table.frame[columns].max().max())
    return largest if math.isfinite(largest) and largest > 0 else 1.0


def _mark(axes: Axes, row: float, value: float) -> None:
    axes.plot([value, value], [row - 0.27, row + 0.27], color="white", linewidth=4.0, zorder=4)
    axes.plot([value, value], [row - 0.27, row + 0.27], color="black", linewidth=2.0, zorder=5)


def _explain_mark(figure: Figure, axes: Axes, label: str) -> None:
    line = axes.plot([], [], color="black", linewidth=2.0, marker="|", linestyle="none",
                     markersize=12, markeredgewidth=2.0)[0]  # fmt: skip
    figure.legend([line], [label], loc="outside lower right", borderaxespad=0.2)
