"""Findings of a sweep: comparisons with each reference, and titles of charts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.sweep import (
    ALL_RULES,
    BH_DROP,
    GATE_MASS,
    OEA,
    PER_LAYER,
    REFERENCES,
    STEP_REFERENCES,
    TOP_P,
    SweepTables,
    Winner,
)
from bh_routing.analysis.sweep_equal_cost import EqualCost
from bh_routing.analysis.sweep_records import PointRow
from bh_routing.report.facts import child
from bh_routing.report.text import listed, percent, plain

NAMES: Final = {
    STATIC: "static top-k",
    TOP_P: "top-p",
    PER_LAYER: "per-layer top-k",
    BH_DROP: "BH-drop per token",
    OEA: "OEA",
    GATE_MASS: "the gate-mass budget",
}


@dataclass(frozen=True, slots=True)
class SweepFacts:
    """Data of SWEEP.md."""

    tables: SweepTables

    @property
    def model(self) -> object:
        """Name of the model."""
        return child(self.tables.sweep.run, "model").get("name")

    @property
    def overall(self) -> list[Winner]:
        """Overall winner at each budget."""
        return [w for w in self.tables.winners if w.among == ALL_RULES]

    @property
    def is_compared(self) -> bool:
        """Whether any point could be compared with static top-k."""
        return any(winner.row for winner in self.overall)

    @property
    def references(self) -> list[tuple[str, str]]:
        """Names of the references; those other than static top-k and top-p only if requested."""
        asked = {row.rule for row in self.tables.points} | {STATIC}
        if not self.tables.has_steps:
            return [(name, NAMES[name]) for name in REFERENCES if name in {*asked, TOP_P}]
        return [(name, NAMES[name]) for name in STEP_REFERENCES if name in asked]

    @property
    def decode_batch(self) -> object:
        """Sequences per emulated decode step; None without steps."""
        return child(self.tables.sweep.run, "text").get("decode_batch")

    @property
    def curves(self) -> list[tuple[str, str]]:
        """References other than static top-k."""
        return [reference for reference in self.references if reference[0] != STATIC]

    @property
    def bh(self) -> list[Winner]:
        """Best BH variant at each budget."""
        return [w for w in self.tables.winners if w.among != ALL_RULES]

    @property
    def bh_rows(self) -> list[PointRow]:
        """Rows of the best BH variants that could be compared."""
        return [winner.row for winner in self.bh if winner.row]

    @property
    def bh_answers(self) -> list[tuple[str, list[tuple[str, list[Winner]]]]]:
        """Less or more -> reference -> budgets with a clearly lower or higher loss."""
        found = []
        for answer, how in (("yes", "less"), ("no", "more")):
            parts = [(shown, self.having(answer, name)) for name, shown in NAMES.items()]
            if parts := [(shown, own) for shown, own in parts if own]:
                found.append((how, parts))
        return found

    def having(self, answer: str, name: str) -> list[Winner]:
        """Return the best BH variants with an answer about one reference."""
        return [w for w in self.bh if w.row and self.against(w.row, name).answer == answer]

    @property
    def bh_domains(self) -> list[tuple[int, PointRow]]:
        """Domains in which the best BH variant clearly loses less than static top-k."""
        rows = self.bh_rows
        return list(zip(clear_domains(self.tables, rows), rows, strict=True))

    @property
    def harder_bar(self) -> list[tuple[int, int, str]]:
        """(remaining wins, wins, reference) if the reference is interpolated in log loss."""
        found = []
        for name, shown in NAMES.items():
            compared = [self.against(row, name) for row in self.tables.points]
            won = [one for one in compared if one.answer == "yes"]
            if won:
                kept = sum(one.is_kept_in_logs for one in won)
                found.append((kept, len(won), shown))
        return found

    @property
    def compared(self) -> list[PointRow]:
        """Rows of rules at the requested budgets, by budget."""
        rows = [r for r in self.tables.points if r.rule != STATIC and not r.is_curve_only]
        return sorted(rows, key=lambda row: -row.budget)

    @property
    def scored(self) -> list[PointRow]:
        """Scored rows."""
        return [row for row in self.tables.points if math.isfinite(row.mean_experts)]

    @property
    def off_budget(self) -> list[PointRow]:
        """Rows whose mean deviates from their budget."""
        return [row for row in self.tables.points if row.off_budget]

    @property
    def domains(self) -> list[PointRow]:
        """Rows by domain, without static top-k."""
        return [row for row in self.tables.by_domain if row.rule != STATIC]

    @property
    def used(self) -> PointRow:
        """The row scored on the most text."""
        return max(self.tables.points, key=lambda row: row.clusters)

    @property
    def provenance(self) -> list[tuple[str, list[tuple[str, str | int]]]]:
        """Blocks of run.json with their scalar values."""
        found = []
        for block in ("model", "text", "calibration", "provenance", "timing"):
            scalars = [
                (key, f"{value:.6g}" if isinstance(value, float) else value)
                for key, value in child(self.tables.sweep.run, block).items()
                if isinstance(value, str | int | float)
                and not (isinstance(value, bool) or key == "command")
            ]
            if scalars:
                found.append((block, scalars))
        return found

    @property
    def command(self) -> str:
        """The command as typed, or an equivalent one; safe to show verbatim."""
        run = self.tables.sweep.run
        stored = child(run, "provenance").get("command")
        if isinstance(stored, str) and stored.isprintable():
            return stored
        means = child(run, "sweep").get("budgets") or []
        budgets = "".join(f" --budget {budget:g}" for budget in means)
        model = str(child(run, "model").get("name") or "demo")
        quoted = shlex.quote(model) if model.isprintable() else "MODEL"
        tokens = child(run, "text").get("tokens")
        size = f" --tokens {tokens}" if isinstance(tokens, int) else ""
        batch = self.decode_batch
        steps = f" --cost distinct --decode-batch {batch}" if isinstance(batch, int) else ""
        return f"bh-routing sweep --model {quoted}{steps}{budgets}{size} --output FOLDER"

    def against(self, row: PointRow, name: str) -> EqualCost:
        """Return the comparison of a row with one reference, in the row's domain."""
        return self.tables.against(row, name)

    def drift(self, row: PointRow) -> float:
        """Return a domain's mean cost minus that of the whole text."""
        whole = next(own for own in self.tables.points if own.config_name == row.config_name)
        return row.cost - whole.cost

    def span(self, winners: Sequence[Winner], name: str = STATIC) -> str:
        """Format the range of fractions saved of a reference's increase."""
        return span_saved(self.tables, winners, name)

    def by_answer(self, winners: Sequence[Winner], name: str) -> dict[str, list[list[Winner]]]:
        """Group winners by answer, without those that are the reference itself."""
        found: dict[str, list[list[Winner]]] = {}
        for winner in winners:
            if winner.row and winner.row.rule != name:
                answer = self.against(winner.row, name).answer
                found.setdefault(answer, [[]])[0].append(winner)
        return found


def series_label(row: PointRow) -> str:
    """Return the names of a rule and its variant, without repetition.

    A variant's label may begin with the rule's own name.
    """
    if not row.variant or row.variant.startswith(row.rule):
        return row.variant or row.rule
    return f"{row.rule} {row.variant}"


def budgets_of(winners: Sequence[Winner]) -> str:
    """List the budgets of winners, as in a sentence."""
    if any(w.row and math.isfinite(w.row.mean_distinct_experts) for w in winners):
        return f"{listed(percent(w.budget) for w in winners)} of the distinct experts"
    return f"{listed(f'{w.budget:g}' for w in winners)} experts"


def span_saved(tables: SweepTables, winners: Sequence[Winner], name: str = STATIC) -> str:
    """Format the range of fractions saved of a reference's increase."""
    shares = sorted(tables.against(w.row, name).saved for w in winners if w.row)
    shares = [share for share in shares if math.isfinite(share)]
    return " to ".join(dict.fromkeys(percent(share) for share in (shares[:1] + shares[-1:])))


def pareto_title(tables: SweepTables) -> str:
    """State which rules beat static top-k at equal cost, and by how much."""
    known = [w for w in tables.winners if w.among == ALL_RULES and w.row]
    clear = [w for w in known if w.row and tables.against(w.row, STATIC).answer == "yes"]
    if not known:
        return "Loss and experts of each rule"
    if not clear:
        return "No rule clearly loses less than static top-k with as many experts"
    names = {series_label(w.row) for w in clear if w.row}
    who = plain(names.pop()) if len(names) == 1 else "The best rule"
    saves = f"{who} saves {span_saved(tables, clear)} of static top-k's loss"
    if len(clear) == len(known):
        return f"{saves} with as many experts"
    return f"At {budgets_of(clear)} {saves[0].lower() + saves[1:]}"


def domains_title(tables: SweepTables) -> str:
    """State in how many domains the winners clearly lose less than static top-k."""
    rows = [w.row for w in tables.winners if w.among == ALL_RULES and w.row]
    if not rows:
        return "Loss and experts of each rule by domain"
    clear, of = clear_domains(tables, rows), len(tables.domain_names)
    ends = dict.fromkeys(str(end(clear)) for end in (min, max))
    loses = "clearly loses less than static top-k in"
    if min(clear) == of:
        return f"The best rule {loses} all {of} domains, at every budget"
    if max(clear) == 0:
        return f"The best rule of a budget {loses} no domain"
    return f"The best rule of a budget {loses} {' to '.join(ends)} of {of} domains"


def clear_domains(tables: SweepTables, rows: Sequence[PointRow]) -> list[int]:
    """Count, for each row, the domains whose interval against static top-k is below 0."""
    return [
        sum(tables.against(replace(row, domain=name), STATIC).high < 0
            for name in tables.domain_names)
        for row in rows
    ]  # fmt: skip
