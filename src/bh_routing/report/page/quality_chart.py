"""Quality lost against experts kept, with intervals and the static curve to beat."""

from __future__ import annotations

import math
from typing import Any, Final

from bh_routing.report import findings
from bh_routing.report.facts import Facts
from bh_routing.report.page.charts import Chart, Figure, axis, finite, markers
from bh_routing.report.quality import QualityRow, reference_at
from bh_routing.report.quality_plot import percent_change
from bh_routing.report.style import BASELINE_COLOUR, GUIDE_COLOUR, colours_of
from bh_routing.report.text import loss_percent, number, plain

NEAR: Final = 60.0
"""Percent; above twice this a second view keeps the small losses readable."""


def quality_charts(facts: Facts) -> list[Chart]:
    """Draw the change in perplexity against experts; nothing if quality wasn't measured."""
    rows = facts.quality
    if not rows:
        return []
    names = [row.name for row in rows if not row.is_static]
    palette, shapes = colours_of(names), markers(names)
    static = sorted((row for row in rows if row.is_static), key=lambda row: row.mean_experts)
    traces = [_trace("static top-k", static, BASELINE_COLOUR, "circle-open", line=True)]
    traces += [
        _trace(row.name, [row], palette[row.name], shapes[row.name])
        for row in rows
        if not row.is_static
    ]
    for trace in traces:
        trace["text"] = [_hover(facts, rows, name) for name in trace.pop("names")]
    whole = _layout(facts.margin)
    variants: dict[str, Figure] = {"all of them": {"data": traces, "layout": whole}}
    worst = max(percent_change(row.delta_nll) for row in rows)
    if worst > 2 * NEAR:
        near = axis("change in perplexity (%)", range=[-0.05 * NEAR, NEAR])
        variants[f"losses up to {NEAR:.0f} %"] = {
            "data": traces,
            "layout": {**whole, "yaxis": near},
        }
    return [
        Chart(
            key="quality-experts",
            finding=plain(findings.quality(rows)),
            description=(
                "Each configuration's change in perplexity against its mean number of experts, "
                "with 95 % intervals; the grey line is the model with a fixed smaller number."
            ),
            variants=variants,
            chooser="Show",
            header=("configuration", "experts", "change in perplexity", "95 % interval"),
            rows=[
                (
                    plain(r.name, 60),
                    number(r.mean_experts),
                    loss_percent(r.perplexity_ratio),
                    _ends(r),
                )
                for r in rows
            ],
            height=460,
        )
    ]


def _layout(margin: float) -> dict[str, Any]:
    return {
        "xaxis": axis("experts kept per token and layer", rangemode="tozero"),
        "yaxis": axis("change in perplexity (%)", zeroline=True),
        "hovermode": "closest",
        "shapes": [_margin_line(margin)],
    }


def _trace(
    label: str, rows: list[QualityRow], colour: str, symbol: str, line: bool = False
) -> dict[str, Any]:
    y = [percent_change(row.delta_nll) for row in rows]
    above = [percent_change(r.high) - v for r, v in zip(rows, y, strict=True)]
    below = [v - percent_change(r.low) for r, v in zip(rows, y, strict=True)]
    return {
        "type": "scatter",
        "mode": "lines+markers" if line else "markers",
        "name": plain(label, 40),
        "names": [row.name for row in rows],
        "x": [finite(row.mean_experts) for row in rows],
        "y": [finite(value) for value in y],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [finite(max(v, 0.0)) for v in above],
            "arrayminus": [finite(max(v, 0.0)) for v in below],
            "thickness": 1.6,
        },
        "marker": {"color": colour, "symbol": symbol, "size": 11},
        "line": {"color": GUIDE_COLOUR, "width": 1.5},
        "hovertemplate": "%{text}<extra></extra>",
    }


def _hover(facts: Facts, rows: list[QualityRow], name: str) -> str:
    row = next(row for row in rows if row.name == name)
    static = reference_at(rows, row.mean_experts)
    settings = [
        f"{key} {value}"
        for key, value in facts.config(name).items()
        if key != "description" and value is not None
    ]
    lines = [
        plain(name, 60),
        f"{number(row.mean_experts)} experts, perplexity {loss_percent(row.perplexity_ratio)} "
        f"({_ends(row)})",
    ]
    if math.isfinite(static) and not row.is_static:
        lines.append(f"static top-k there: {loss_percent(math.exp(static))}")
    lines += [plain(", ".join(settings[i : i + 4]), 90) for i in range(0, len(settings), 4)]
    # Plotly reads a few tags in hover texts; names and settings are text.
    return "<br>".join(line.replace("&", "&amp;").replace("<", "&lt;") for line in lines)


def _ends(row: QualityRow) -> str:
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return "too few documents for an interval"
    return f"{loss_percent(row.ratio_low)} to {loss_percent(row.ratio_high)}"


def _margin_line(margin: float) -> dict[str, Any]:
    bound = percent_change(margin)
    line = {"color": GUIDE_COLOUR, "width": 1, "dash": "dash"}
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": bound,
        "y1": bound,
        "line": line,
    }
