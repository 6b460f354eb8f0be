"""Find the rule with the lowest loss at equal cost: points, domains and best rules.

`compare_points` turns a sweep into tidy tables: one row per point, and one per comparison of a
point with a reference, such as static top-k, at the point's own measured cost: mean experts per
token or, of records in decode steps, mean distinct experts per step. sweep_equal_cost.py describes
the method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final, NamedTuple

import pandas as pd

from bh_routing.analysis.quality import DEFAULT_OPTIONS, QualityOptions, quality_table
from bh_routing.analysis.quality_row import STATIC, QualityRow
from bh_routing.analysis.sweep_equal_cost import Curve, EqualCost, compare_at_equal_cost
from bh_routing.analysis.sweep_records import ALL_DOMAINS, PointRow, ScoredText, Sweep, align

TOP_P: Final = "top_p"
PER_LAYER: Final = "per_layer_top_k"
REFERENCES: Final = (STATIC, TOP_P, PER_LAYER)
BH_DROP: Final = "bh_drop"
OEA: Final = "oea"
GATE_MASS: Final = "expert_budget"
STEP_REFERENCES: Final = (STATIC, BH_DROP, OEA, GATE_MASS)
"""References in decode steps: BH-drop per token, and the budget by gate mass."""
_REFERENCE_FIELDS: Final = {BH_DROP: ("scope", "token"), GATE_MASS: ("by", "gate_mass")}
OFF_BUDGET: Final = 0.02
"""A mean that deviates from its budget by more than this fraction is flagged."""
MEAN_EXPERTS: Final = "mean_experts"
"""The cost at which points are compared: experts kept per token."""
MEAN_DISTINCT: Final = "mean_distinct_experts"
"""The same in decode steps: distinct experts per step and layer."""
ALL_RULES: Final = "all rules"
BH_RULES: Final = ("bh_drop",)
"""Rules whose best variant is reported too."""
CONTROLS: Final = ("oracle_contribution", "random_k")
"""Oracle and control: they have rows but are never the best rule."""
STATIC_STEP: Final = 1.0
"""Static top-k is linear between k and k + 1: close to mixing the two at random."""
CURVE_STEP: Final = 1.25
"""Points of other curves lie one expert apart, plus the drift of their means between texts."""

_OF_QUALITY: Final = (
    "mean_experts", "mean_distinct_experts", "delta_nll", "delta_nll_low", "delta_nll_high",
    "perplexity_ratio", "kl_mean", "same_top1_share", "tokens", "documents", "clusters", "method",
)  # fmt: skip
"""Columns of a point that are those of its row in the quality table."""

Found = Mapping[tuple[str, str, str], EqualCost]
_KEYS: Final = {
    "config_name": "As in points.csv.",
    "rule": "As in points.csv.",
    "variant": "As in points.csv.",
    "budget": "As in points.csv.",
    "reference": "Rule that the point is compared with.",
    "domain": "Domain of the text, or all.",
    "cost": "Quantity that is equal in the comparison: mean_experts or mean_distinct_experts.",
}
_ANSWER: Final = (
    "Whether the rule's loss is lower; yes: the interval of difference is below 0 and p_corrected "
    "below 0.05; no: both say that it is higher; undecided: neither; unknown: not compared."
)


def comparison_definitions() -> dict[str, str]:
    """Map each column of comparisons.csv to its definition."""
    values = {f.name: str(f.metadata["definition"]) for f in fields(EqualCost)}
    return {**_KEYS, "answer": _ANSWER, **values}


class Winner(NamedTuple):
    """The point of a budget that saves most of static top-k's loss at its own mean, as a fraction.

    Not that with the lowest loss: means differ by a few percent within a budget.
    """

    budget: float
    among: str
    """all rules, or the one rule whose variants competed."""
    row: PointRow | None
    """None if no point could be compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepTables:
    """Tables of an analysed sweep."""

    sweep: Sweep
    points: tuple[PointRow, ...]
    by_domain: tuple[PointRow, ...]
    found: Mapping[tuple[str, str, str], EqualCost]
    """(configuration, reference, domain or all) -> comparison."""

    @property
    def has_steps(self) -> bool:
        """Whether the rules were compared in decode steps, at equal distinct experts."""
        return any(math.isfinite(row.mean_distinct_experts) for row in self.points)

    @property
    def num_tests(self) -> int:
        """Size of the family for Holm's correction and the joint intervals."""
        whole = (one for (*_, domain), one in self.found.items() if domain == ALL_DOMAINS)
        return sum(math.isfinite(one.p) for one in whole)

    @property
    def domain_names(self) -> list[str]:
        """Domains of the text."""
        return list(dict.fromkeys(domain for *_, domain in self.found if domain != ALL_DOMAINS))

    @property
    def comparisons(self) -> pd.DataFrame:
        """One row per point, reference and domain: the content of comparisons.csv."""
        points = {row.config_name: row for row in self.points}
        cost = MEAN_DISTINCT if self.has_steps else MEAN_EXPERTS
        rows = [
            (name, points[name].rule, points[name].variant, points[name].budget, reference, domain,
             cost, one.answer, *(getattr(one, f.name) for f in fields(EqualCost)))
            for (name, reference, domain), one in self.found.items()
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=list(comparison_definitions()))

    @property
    def winners(self) -> list[Winner]:
        """Winners of each budget: among all rules, and among the variants of BH-drop."""
        tested = [row for row in self.points if _is_tested(row)]
        contests = (ALL_RULES, *(rule for rule in BH_RULES if any(r.rule == rule for r in tested)))
        ranked = sorted((row for row in tested if row.rank), key=lambda row: row.rank or 0)
        return [
            Winner(
                budget,
                among,
                next((row for row in ranked
                      if row.budget == budget and among in (ALL_RULES, row.rule)), None),
            )
            for budget in sorted({row.budget for row in tested}, reverse=True)
            for among in contests
        ]  # fmt: skip

    def against(self, row: PointRow, reference: str) -> EqualCost:
        """Return a row's comparison with a reference, in its domain; NaN if there is none."""
        return self.found.get((row.config_name, reference, row.domain), EqualCost())

    def domains_won(self, row: PointRow, reference: str) -> int:
        """Count the domains in which a point's estimate is below that of a reference."""
        there = (self.against(replace(row, domain=name), reference) for name in self.domain_names)
        return sum(one.difference < 0 for one in there)


def _is_tested(row: PointRow) -> bool:
    return not (row.rule in (STATIC, *CONTROLS) or row.is_curve_only)


def compare_points(sweep: Sweep, options: QualityOptions = DEFAULT_OPTIONS) -> SweepTables:
    """Compare the points of a sweep that was read or has just been made, at equal cost.

    Args:
        sweep: points and scored documents.
        options: resamples and seed; the margin is ignored.
    Returns:
        The tables, which are deterministic.
    Raises:
        ResultsError: no token was scored.
    """
    text = align(sweep.records)
    parts = {name: text.domain(name) for name in sorted(set(text.domains_D.tolist()))}
    quality = {row.config_name: row for row in quality_table(sweep.records, options)}
    found = {
        (*key, domain): one
        for domain, part in ((ALL_DOMAINS, text), *parts.items())
        for key, one in _compare(sweep, part, options, simultaneous=domain == ALL_DOMAINS).items()
    }
    own = next((r.mean_distinct_experts for r in quality.values() if r.is_reference), math.nan)
    points = [_row(p, quality.get(p.config_name), found, own) for p in sweep.points]
    by_domain = tuple(
        _domain_row(row, quality[row.config_name], part, domain, found)
        for row in points
        if row.config_name in quality and not row.is_curve_only
        for domain, part in parts.items()
        if domain in quality[row.config_name].by_domain
    )
    return SweepTables(
        sweep=sweep, points=tuple(_ranked(points, found)), by_domain=by_domain, found=found
    )


def _compare(
    sweep: Sweep, text: ScoredText, options: QualityOptions, *, simultaneous: bool
) -> Mapping[tuple[str, str], EqualCost]:
    curves = _step_curves(sweep) if text.has_steps else _curves(sweep)
    return compare_at_equal_cost(
        text,
        [
            p.config_name
            for p in sweep.points
            if not (p.rule == STATIC or p.is_curve_only)
            and (p.config_name in text.names or not p.note)
        ],
        curves,
        resamples=options.resamples,
        seed=options.seed,
        simultaneous=simultaneous,
    )


def _curves(sweep: Sweep) -> list[Curve]:
    # A reference that wasn't requested gets no note on missing points.
    rules = {point.rule for point in sweep.points} | {STATIC, TOP_P}
    return [
        Curve(
            name=name,
            config_names=tuple(p.config_name for p in sweep.points if p.rule == name),
            widest=STATIC_STEP if name == STATIC else CURVE_STEP,
        )
        for name in REFERENCES
        if name in rules
    ]


def _step_curves(sweep: Sweep) -> list[Curve]:
    """Return the references in decode steps, each the first variant of its rule that is one.

    Neighbouring points are one expert per token or a twentieth of the reads apart.
    """
    curves = []
    for name in STEP_REFERENCES:
        field, value = _REFERENCE_FIELDS.get(name, ("method", name))
        own = [
            p
            for p in sweep.points
            if p.rule == name and sweep.configs[p.config_name].get(field) == value
        ]
        names = tuple(p.config_name for p in own if p.variant == own[0].variant)
        if names:
            curves.append(Curve(name=name, config_names=names))
    return curves


def _ranked(rows: Sequence[PointRow], found: Found) -> list[PointRow]:
    saved = {
        row.config_name: found.get((row.config_name, STATIC, ALL_DOMAINS), EqualCost()).saved
        for row in rows
        if _is_tested(row)
    }
    known = pd.Series(saved, dtype=float).dropna()
    budgets = {row.config_name: row.budget for row in rows}
    ranks = (
        known.groupby([budgets[name] for name in known.index])
        .rank(method="first", ascending=False)
        .astype(int)
        .to_dict()
    )
    return [replace(row, rank=ranks.get(row.config_name)) for row in rows]


def _row(point: PointRow, quality: QualityRow | None, found: Found, own: float) -> PointRow:
    """Return a compared point; `own` is what the model's own top-k reads in a decode step."""
    notes = [point.note]
    if quality:
        point = replace(point, **{name: getattr(quality, name) for name in _OF_QUALITY})
        notes.append(quality.note)
    elif not point.note:
        notes.append("Not scored yet; resume the sweep to finish it.")
    distinct = point.mean_distinct_experts
    cost = distinct / own if math.isfinite(distinct) else point.mean_experts
    return replace(
        point,
        off_budget=abs(cost / point.budget - 1) > OFF_BUDGET,
        note=_joined([*notes, *_notes(point.config_name, ALL_DOMAINS, found)]),
    )


def _domain_row(
    row: PointRow, quality: QualityRow, text: ScoredText, domain: str, found: Found
) -> PointRow:
    part = quality.by_domain[domain]
    mean = math.nan
    if row.config_name in text.names:
        kept_D = text.cost_DC[:, text.names.index(row.config_name)]
        mean = float(kept_D.sum() / text.tokens_D.sum())
    # In steps a budget is a fraction, and that of the whole text is the measure.
    goal = row.cost if text.has_steps else row.budget
    return replace(
        row,
        domain=domain,
        mean_experts=math.nan if text.has_steps else mean,
        mean_distinct_experts=mean if text.has_steps else math.nan,
        delta_nll=part.delta_nll,
        delta_nll_low=part.low,
        delta_nll_high=part.high,
        perplexity_ratio=math.exp(part.delta_nll),
        kl_mean=math.nan,
        same_top1_share=math.nan,
        tokens=part.tokens,
        documents=part.documents,
        clusters=len(set(text.clusters_D.tolist())),
        method="",
        off_budget=abs(mean / goal - 1) > OFF_BUDGET,
        note=_joined([part.note, *_notes(row.config_name, domain, found)]),
    )


def _notes(config_name: str, domain: str, found: Found) -> list[str]:
    # Static top-k isn't tested.
    names = dict.fromkeys((*REFERENCES, *STEP_REFERENCES))
    return [found.get((config_name, name, domain), EqualCost()).note for name in names]


def _joined(notes: Sequence[str]) -> str:
    """Join sentences; several references may have the same reason."""
    return " ".join(dict.fromkeys(filter(None, notes)))
