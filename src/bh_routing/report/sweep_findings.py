"""Findings of a sweep: comparisons with each reference, and titles of charts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import pandas as pd

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
from bh_routing.report.facts import Facts, child
from bh_routing.report.text import as_float, listed, percent, plain
from bh_routing.results.files import find_json_object
from bh_routing.results.records import RUN_JSON

POINTS_CSV: Final = "points.csv"
COMPARISONS_CSV: Final = "comparisons.csv"
STEPS: Final = "steps"
"""Subfolder of a run for its sweep by decode step."""
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
        """Best rule of all at each budget."""
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
        """Lower or higher -> reference -> budgets with such a loss, clearly."""
        found = []
        for answer, how in (("yes", "lower"), ("no", "higher")):
            parts = [(shown, self.having(answer, name)) for name, shown in NAMES.items()]
            if parts := [(shown, own) for shown, own in parts if own]:
                found.append((how, parts))
        return found

    def having(self, answer: str, name: str) -> list[Winner]:
        """Return the best BH variants with an answer about one reference."""
        return [w for w in self.bh if w.row and self.against(w.row, name).answer == answer]

    @property
    def bh_domains(self) -> list[tuple[int, PointRow]]:
        """Domains in which the best BH variant is clearly better than static top-k."""
        rows = self.bh_rows
        return list(zip(clear_domains(self.tables, rows), rows, strict=True))

    @property
    def harder_bar(self) -> list[tuple[int, int, str]]:
        """(remaining, clear differences, reference) for references interpolated in log loss."""
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


class BatchAdvice(NamedTuple):
    """How to choose a rule for batches, and the choice if the run's folder has a sweep by step."""

    command: str
    """Sweeps rules on decode steps into the run's folder."""
    decode_batch: object
    """Sequences per decode step of that sweep; None if there is none."""
    best: list[dict[str, Any]]
    """For each budget its best rule: config_name, budget, mean_distinct_experts, perplexity_ratio,
    and saved, saved_low and saved_high of static top-k's increase."""


def batch_advice(facts: Facts) -> BatchAdvice | None:
    """Return the advice for batches; None if the model's own k is 1 or unknown.

    The sweep is in the subfolder STEPS of the run's folder, where the command writes it.
    """
    model = str(facts.model.get("name") or "")
    if not as_float(facts.model.get("model_top_k")) > 1 or not (model and model.isprintable()):
        return None
    folder = facts.folder / STEPS
    words = ["bh-routing", "sweep", "--model", model]
    words += [word for text in facts.spec.get("texts") or [] for word in ("--text", str(text))]
    words += ["--cost", "distinct", "--decode-batch", "16", "--output", str(folder)]
    decode_batch = child(find_json_object(folder / RUN_JSON) or {}, "text").get("decode_batch")
    files = [folder / name for name in (POINTS_CSV, COMPARISONS_CSV)]
    best: list[dict[str, Any]] = []
    if decode_batch and all(file.is_file() for file in files):
        points, compared = map(pd.read_csv, files)
        static = compared.query("reference == @STATIC and domain == 'all' and answer == 'yes'")
        saved = static[["config_name", "saved", "saved_low", "saved_high"]]
        won = points.query("rank == 1").merge(saved, on="config_name")
        rows = won.sort_values("budget", ascending=False).to_dict("records")
        best = [{str(column): value for column, value in row.items()} for row in rows]
    command = " ".join(shlex.join(words).split())  # verbatim in Markdown: no line breaks
    return BatchAdvice(command, decode_batch if best else None, best)


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
    """State which rules are better than static top-k at equal cost, and by how much."""
    known = [w for w in tables.winners if w.among == ALL_RULES and w.row]
    clear = [w for w in known if w.row and tables.against(w.row, STATIC).answer == "yes"]
    if not known:
        return "Loss and experts of each rule"
    if not clear:
        return "No rule has a clearly lower loss than static top-k with as many experts"
    names = {series_label(w.row) for w in clear if w.row}
    who = plain(names.pop()) if len(names) == 1 else "The best rule"
    saves = f"{who} saves {span_saved(tables, clear)} of static top-k's loss"
    if len(clear) == len(known):
        return f"{saves} with as many experts"
    return f"At {budgets_of(clear)} {saves[0].lower() + saves[1:]}"


def domains_title(tables: SweepTables) -> str:
    """State in how many domains the best rules are clearly better than static top-k."""
    rows = [w.row for w in tables.winners if w.among == ALL_RULES and w.row]
    if not rows:
        return "Loss and experts of each rule by domain"
    clear, of = clear_domains(tables, rows), len(tables.domain_names)
    ends = dict.fromkeys(str(end(clear)) for end in (min, max))
    differs = "has a clearly lower loss than static top-k in"
    if min(clear) == of:
        return f"The best rule {differs} all {of} domains, at every budget"
    if max(clear) == 0:
        return f"The best rule of a budget {differs} no domain"
    return f"The best rule of a budget {differs} {' to '.join(ends)} of {of} domains"


def clear_domains(tables: SweepTables, rows: Sequence[PointRow]) -> list[int]:
    """Count, for each row, the domains whose interval against static top-k is below 0."""
    return [
        sum(tables.against(replace(row, domain=name), STATIC).high < 0
            for name in tables.domain_names)
        for row in rows
    ]  # fmt: skip
