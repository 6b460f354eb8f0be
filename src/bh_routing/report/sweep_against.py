"""A sweep's rules beside the references they are compared with at equal cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.sweep import PER_LAYER, TOP_P, SweepTables
from bh_routing.analysis.sweep_row import SweepRow
from bh_routing.report.blocks import table
from bh_routing.report.sweep_verdict import series_label
from bh_routing.report.text import (
    MISSING,
    code,
    interval,
    loss_percent,
    number,
    p_value,
    percent,
    signed,
)

NAMES: Final = {STATIC: "static top-k", TOP_P: "top-p", PER_LAYER: "per-layer top-k"}

WHY_THREE: Final = (
    "Three references, for a rule can win for three reasons. *Static top-k* is what is in use: "
    "beating it says that experts are better spent unevenly. *Top-p* spends them unevenly over "
    "tokens by the router's weights alone: beating it says that a rule knows more than those. "
    "*Per-layer top-k* spends them unevenly over layers, alike for every token; its k of each "
    "layer are chosen on calibration text: beating it says that the choice by token, not only the "
    "shares of the layers, is worth something."
)

HOW: Final = (
    "The difference is the rule's ΔNLL minus the reference's at the rule's own mean number of "
    "experts, in nats a token; *saved* is the share of the reference's increase in perplexity that "
    "the rule avoids. Static top-k lies on the line between its whole neighbours, the others on "
    "the lines between their own points. Books are drawn with replacement, and means and lines are "
    "computed anew in each resample. Intervals are simultaneous over all tests of the table, p is "
    "corrected by Holm over the same tests. *yes* needs both. A rule called "
    "`contribution_threshold` is BH-drop too: run once over all calibration slots, BH gives such a "
    "threshold."
)


def winners_table(tables: SweepTables) -> str:
    """Render who loses least at each budget."""
    names = _references(tables.rows)
    header = ["budget", "among", "loses least", "experts", "ΔPPL"]
    for name in names:
        header += [f"vs {NAMES[name]}", "saved", "p", "beats it"]
    rows = []
    for winner in tables.winners:
        first = [f"{winner.budget:g}", code(winner.among)]
        if winner.row is None:
            rows.append([*first, "none compared", *[MISSING] * (len(header) - 3)])
            continue
        cells = [*first, *_who(winner.row)]
        for name in names:
            cells += [*against(winner.row, name), _answer(winner.row, name)]
        rows.append(cells)
    return table(header, rows)


def each_rule(tables: SweepTables) -> str:
    """Render for each rule and budget whether it beats each reference, and what it saves of it."""
    names = _references(tables.rows)
    rows = [
        [f"{row.budget:g}", *_who(row), *(_in_short(row, name) for name in names)]
        for row in sorted(tables.rows, key=lambda row: -row.budget)
        if row.rule != STATIC and not row.is_curve_only
    ]
    header = ["budget", "rule", "experts", "ΔPPL", *(f"beats {NAMES[name]}" for name in names)]
    how = "Behind the answer what the rule saves of the reference's increase, and the interval."
    return f"{table(header, rows)}\n\n{how}" if rows else ""


def against(row: SweepRow, name: str) -> list[str]:
    """Three cells: the difference from a reference, the share saved, and p."""
    ends = interval(_value(row, name, "low"), _value(row, name, "high"), 3)
    difference = _value(row, name, "difference")
    return [
        f"{signed(difference, 3)} {ends}" if math.isfinite(difference) else MISSING,
        _saved(row, name) or MISSING,
        p_value(_value(row, name, "p_corrected")),
    ]


def _references(rows: Sequence[SweepRow]) -> list[str]:
    """Per-layer top-k only where it was asked for."""
    asked = {row.rule for row in rows} | {STATIC, TOP_P}
    return [name for name in NAMES if name in asked]


def _who(row: SweepRow) -> list[str]:
    return [code(series_label(row)), number(row.mean_experts), loss_percent(row.perplexity_ratio)]


def _value(row: SweepRow, name: str, field: str) -> float:
    return float(getattr(row, f"{name}_{field}"))


def _saved(row: SweepRow, name: str) -> str:
    saved = _value(row, name, "saved")
    if not math.isfinite(saved):
        return ""
    low, high = (100 * _value(row, name, f"saved_{end}") for end in ("low", "high"))
    return f"{percent(saved)} {interval(low, high, 0)}"


def _answer(row: SweepRow, name: str) -> str:
    answer = str(getattr(row, f"beats_{name}"))
    return f"**{answer}**" if answer == "yes" else answer


def _in_short(row: SweepRow, name: str) -> str:
    if row.rule == name:
        return MISSING
    return f"{_answer(row, name)} {_saved(row, name)}".strip()
