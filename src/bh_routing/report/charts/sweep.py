"""Charts of loss against cost, with one line per rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.sweep import SweepTables
from bh_routing.analysis.sweep_records import PointRow
from bh_routing.report.charts.chart import Chart
from bh_routing.report.charts.marks import (
    Looks,
    Point,
    add_legend,
    draw_points,
    loss_axis,
    percent_change,
)
from bh_routing.report.charts.style import BASELINE, FIXED_LOOKS, Picture, looks_of, new_figure
from bh_routing.report.sweep_findings import series_label
from bh_routing.report.text import for_plot

PARETO_PLOT: Final = "pareto.png"
DOMAINS_PLOT: Final = "pareto_domains.png"
LEAST_SAVED: Final = -40.0
"""Rules that save less, in percent, are shown as small triangles at the lower edge."""

Rows = Sequence[PointRow]


def pareto(tables: SweepTables, finding: str) -> Chart:
    """Increase in perplexity against mean experts, and the percentage of it that each rule saves.

    In the upper panel static top-k is the grey line; lower is better, and intervals are pointwise.
    The lower panel has the paired comparison of the same points with static top-k at the same mean,
    which is the line at 0, with simultaneous intervals.
    """

    def draw() -> Picture:
        shown = [row for row in tables.points if not row.is_curve_only]
        looks = _looks(shown)
        figure, (above, below) = new_figure(
            6.2 + 0.1 * len(looks), width_inches=6.4, nrows=2, height_ratios=[1.6, 1]
        )
        _draw_losses(figure, above, shown, looks)
        _draw_saved(figure, below, tables, looks)
        add_legend(figure, looks, above.get_lines()[0])
        return figure

    what = "Increase in perplexity against mean experts by rule, and the part saved."
    return Chart(finding=finding, description=what, views={"": draw})


def domains(tables: SweepTables, finding: str) -> Chart:
    """Increase in perplexity against mean experts, in each domain of the text."""
    rows = tables.by_domain

    def draw() -> Picture:
        names, looks = list(dict.fromkeys(row.domain for row in rows)), _looks(rows)
        count = max(1, len(names))
        figure, grid = new_figure(
            5.0,
            width_inches=3.2 + 2.2 * count,
            ncols=count,
            squeeze=False,
            sharex=True,
            sharey=True,
        )
        for axes, name in zip(grid[0], names, strict=False):
            _draw_losses(figure, axes, [row for row in rows if row.domain == name], looks)
            axes.set_title(for_plot(name, 24), loc="left")
        add_legend(figure, looks, *grid[0][0].get_lines()[:1])
        return figure

    what = "Increase in perplexity against mean experts by rule, in each domain."
    return Chart(finding=finding, description=what, views={"": draw})


def _looks(rows: Rows) -> Looks:
    """Return colour and marker of each rule and variant, distinct from the baseline's."""
    labels = dict.fromkeys(series_label(row) for row in rows if row.rule != STATIC)
    looks = looks_of([*list(FIXED_LOOKS)[1:], *(f"rule {i}" for i in range(len(labels)))])
    return dict(zip(labels, looks.values(), strict=False))


def _draw_losses(figure: Picture, axes: Axes, rows: Rows, looks: Looks) -> None:
    known = sorted(
        (row for row in rows if math.isfinite(row.cost + row.delta_nll)),
        key=lambda row: row.cost,
    )
    static = [_point(row, STATIC) for row in known if row.rule == STATIC]
    points = [_point(row, series_label(row)) for row in known if row.rule != STATIC]
    curve = Line2D([p.x for p in static], [p.y for p in static], color=BASELINE, linewidth=2.4)
    curve.set(label="static top-k", zorder=1)
    axes.add_line(curve)
    for point in static:
        axes.vlines(point.x, point.low, point.high, color=BASELINE, alpha=0.25, linewidth=5)
    for name, (colour, _) in looks.items():
        line = [(point.x, point.y) for point in points if point.name == name] or [(math.nan,) * 2]
        axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.2)
    draw_points(figure, axes, points, looks)
    # Static top-k extends to both sides; its points there don't set the scale.
    means = [point.x for point in points or static] or [0.0, 1.0]
    left, right = min(means) - 0.25, max(means) + 0.25
    seen = [*points, *(point for point in static if left <= point.x <= right)]
    axes.set_xlim(left, right)
    loss_axis(axes, [end for point in seen for end in point[2:5]])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    has_steps = any(math.isfinite(row.mean_distinct_experts) for row in rows)
    cost = "Distinct experts per decode step" if has_steps else "Experts kept per token"
    axes.set(xlabel=cost, ylabel="Increase in perplexity (%)")


def _point(row: PointRow, label: str) -> Point:
    y, low, high = map(percent_change, (row.delta_nll, row.delta_nll_low, row.delta_nll_high))
    return Point(label, row.cost, y, low, high)


def _draw_saved(figure: Picture, axes: Axes, tables: SweepTables, looks: Looks) -> None:
    rows = [row for row in tables.points if not (row.is_curve_only or row.rule == STATIC)]
    budgets = sorted({row.budget for row in rows})
    slots = {label: (i + 0.5) / len(looks) - 0.5 for i, label in enumerate(looks)}
    for row in rows:
        compared, label = tables.against(row, STATIC), series_label(row)
        saved = 100 * compared.saved
        if not math.isfinite(saved):
            continue
        at = budgets.index(row.budget) + 0.8 * slots[label]
        if saved > LEAST_SAVED:
            low, high = 100 * compared.saved_low, 100 * compared.saved_high
            point = Point(label, at, saved, max(low, LEAST_SAVED), high)
            draw_points(figure, axes, [point], looks)
        else:  # at the edge, where it doesn't set the scale
            axes.plot(at, 0.03, marker="v", markersize=6, color=looks[label][0],
                      transform=axes.get_xaxis_transform())  # fmt: skip
    axes.axhline(0.0, color=BASELINE, linewidth=2.4, zorder=1)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], LEAST_SAVED - 8))
    axes.set_xlim(-0.5, max(len(budgets), 1) - 0.5)
    axes.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    axes.set(
        xlabel=f"Budget of experts (triangles: below {LEAST_SAVED:g} %)",
        ylabel="Saved of static\ntop-k's increase (%)",
    )
