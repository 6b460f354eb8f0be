"""Charts of the loss of quality against experts kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from bh_routing.analysis.quality_row import QualityRow
from bh_routing.report import findings
from bh_routing.report.charts.chart import Chart, chart
from bh_routing.report.charts.marks import (
    Looks,
    Point,
    add_legend,
    draw_points,
    from_zero,
    loss_axis,
    percent_change,
)
from bh_routing.report.charts.style import BASELINE, INK, SOFT, Picture, looks_of, new_figure
from bh_routing.report.facts import Facts
from bh_routing.report.quality import reference_at
from bh_routing.report.text import loss_percent, number, plain

STATIC_LABEL = "static top-k"
HEADER = ("configuration", "experts", "change in perplexity", "95 % interval")


@chart("quality")
def quality_vs_experts(facts: Facts) -> Chart | None:
    """Change in perplexity against mean experts, with the curve of static top-k."""
    rows = facts.quality.rows
    if not rows:
        return None
    static = sorted((row for row in rows if row.is_static), key=lambda row: row.mean_experts)
    tested = [row for row in rows if not row.is_static]
    points = [_point(row, STATIC_LABEL) for row in static]
    for row in tested:
        there = reference_at(rows, row.mean_experts)
        note = f"; static top-k there {loss_percent(math.exp(there))}" * math.isfinite(there)
        points.append(_point(row, row.config_name, note))
    looks: Looks = {STATIC_LABEL: (BASELINE, "o")} if static else {}
    looks = {**looks, **looks_of([row.config_name for row in tested])}
    return Chart(
        finding=plain(findings.quality(facts.quality)),
        description=(
            "Change in perplexity against mean experts, by configuration, with 95 % intervals; "
            "the grey line is the model with a smaller fixed number."
        ),
        views={"": lambda: _draw(points, looks, facts.margin)},
        table=[HEADER, *map(_cells, rows)],
    )


def compared_quality(runs: Mapping[str, Facts]) -> Chart | None:
    """The same for several runs: a configuration has the marker of its run."""
    rows = [(run, row) for run, facts in runs.items() for row in facts.quality.rows]
    if not rows:
        return None
    points = [_point(row, run, f" in {plain(run, 40)}") for run, row in rows]
    return Chart(
        finding="Quality against experts, run by run",
        description="Change in perplexity against mean experts, with 95 % intervals, by run.",
        views={"": lambda: _draw(points, looks_of(runs), next(iter(runs.values())).margin)},
        table=[("run", *HEADER), *((plain(run, 40), *_cells(row)) for run, row in rows)],
    )


def _point(row: QualityRow, label: str, note: str = "") -> Point:
    y, low, high = map(percent_change, (row.delta_nll, row.delta_nll_low, row.delta_nll_high))
    text = "{}: {} experts, perplexity {} ({})".format(*_cells(row))
    return Point(label, row.mean_experts, y, low, high, text + note)


def _cells(row: QualityRow) -> tuple[str, str, str, str]:
    known = math.isfinite(row.delta_nll_low) and math.isfinite(row.delta_nll_high)
    ends = f"{loss_percent(row.perplexity_ratio_low)} to {loss_percent(row.perplexity_ratio_high)}"
    return (
        plain(row.config_name, 60),
        number(row.mean_experts),
        loss_percent(row.perplexity_ratio),
        ends if known else "too few documents for an interval",
    )


def _draw(points: Sequence[Point], looks: Looks, margin: float) -> Picture:
    figure, axes = new_figure(3.9 + 0.09 * len(looks))
    curve = [(point.x, point.y) for point in points if point.name == STATIC_LABEL]
    if curve:
        axes.plot(*zip(*curve, strict=True), color=BASELINE, linewidth=1.8)
    draw_points(figure, axes, points, looks)
    loss_axis(axes, [0.0, *(value for p in points for value in (p.y, p.low, p.high))])
    axes.axhline(0.0, color=INK, linewidth=0.9)
    bound = percent_change(margin)
    line = axes.axhline(bound, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
    line.set_label(f"margin of no loss, +{bound:.1f} %")
    from_zero(axes, x=max(point.x for point in points))
    axes.grid()
    axes.set(xlabel="Experts kept per token and layer", ylabel="Change in perplexity (%)")
    add_legend(figure, looks, line)
    return figure
