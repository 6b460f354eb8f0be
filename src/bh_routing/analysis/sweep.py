"""Find the rule with the lowest loss at equal cost: points, domains and winners of a sweep.

`analyze_sweep` turns the folder of a `bh-routing sweep` into three tables. Every rule is compared
with static top-k, top-p and per-layer top-k at its own measured mean number of experts;
sweep_equal_cost.py describes the method, sweep_records.py the columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bh_routing.analysis.quality import DEFAULT_OPTIONS, QualityOptions, quality_table
from bh_routing.analysis.quality_row import STATIC, QualityRow
from bh_routing.analysis.sweep_equal_cost import Curve, EqualCost, compare_at_equal_cost
from bh_routing.analysis.sweep_records import (
    DomainRow,
    ScoredText,
    Sweep,
    SweepPoint,
    SweepRow,
    Winner,
    align,
    read_sweep,
)

TOP_P: Final = "top_p"
PER_LAYER: Final = "per_layer_top_k"
REFERENCES: Final = (STATIC, TOP_P, PER_LAYER)
OFF_BUDGET: Final = 0.02
"""A mean that deviates from its budget by more than this fraction is flagged."""
ALL_RULES: Final = "all rules"
BH_RULES: Final = ("bh_drop",)
"""Rules with a winner of their own, in addition to the overall winner."""
CONTROLS: Final = ("oracle_contribution", "random_k")
"""Oracle and control: they have rows but can't win."""
STATIC_STEP: Final = 1.0
"""Static top-k is linear between k and k + 1: close to mixing the two at random."""
CURVE_STEP: Final = 1.25
"""Points of other curves lie one expert apart, plus the drift of their means between texts."""

Comparisons = Mapping[tuple[str, str], EqualCost]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepTables:
    """Tables of an analysed sweep."""

    sweep: Sweep
    rows: tuple[SweepRow, ...]
    domains: tuple[DomainRow, ...]
    winners: tuple[Winner, ...]
    num_tests: int
    """Size of the family for Holm's correction and the joint intervals."""


def analyze_sweep(folder: Path, options: QualityOptions = DEFAULT_OPTIONS) -> SweepTables:
    """Compare the points of a sweep at equal mean experts.

    Args:
        folder: contains run.json and quality.jsonl.
        options: resamples and seed; the margin is ignored.
    Returns:
        The tables, which are deterministic.
    Raises:
        ResultsError: the folder isn't that of a sweep, or one of its files is damaged.
    """
    return compare_points(read_sweep(folder), options)


def compare_points(sweep: Sweep, options: QualityOptions = DEFAULT_OPTIONS) -> SweepTables:
    """Compare the points of a sweep that was read or has just been made."""
    text = align(sweep.records)
    domain_names = sorted(set(text.domains_D.tolist()))
    quality = {row.config_name: row for row in quality_table(sweep.records, options)}
    overall = _compare(sweep, text, options, simultaneous=True)
    by_domain = {
        domain: _compare(sweep, text.domain(domain), options, simultaneous=False)
        for domain in domain_names
    }
    rows = tuple(
        _row(point, quality.get(point.config_name), overall, by_domain) for point in sweep.points
    )
    domains = tuple(
        _domain_row(point, quality[point.config_name], text.domain(domain), domain, compared)
        for point in sweep.points
        if point.config_name in quality and not point.is_curve_only
        for domain, compared in by_domain.items()
        if domain in quality[point.config_name].by_domain
    )
    return SweepTables(
        sweep=sweep,
        rows=rows,
        domains=domains,
        winners=_winners(rows),
        num_tests=sum(math.isfinite(found.p) for found in overall.values()),
    )


def _compare(
    sweep: Sweep, text: ScoredText, options: QualityOptions, *, simultaneous: bool
) -> Comparisons:
    # A reference that wasn't requested gets no note on missing points.
    rules = {point.rule for point in sweep.points} | {STATIC, TOP_P}
    curves = [
        Curve(
            name=name,
            config_names=tuple(p.config_name for p in sweep.points if p.rule == name),
            widest=STATIC_STEP if name == STATIC else CURVE_STEP,
        )
        for name in REFERENCES
        if name in rules
    ]
    return compare_at_equal_cost(
        text,
        [
            p.config_name
            for p in sweep.points
            if not (p.rule == STATIC or p.is_curve_only)
            and (p.config_name in text.names or not p.unreachable)
        ],
        curves,
        resamples=options.resamples,
        seed=options.seed,
        simultaneous=simultaneous,
    )


def _row(
    point: SweepPoint,
    quality: QualityRow | None,
    overall: Comparisons,
    by_domain: Mapping[str, Comparisons],
) -> SweepRow:
    nan = math.nan
    mean = quality.mean_experts if quality else nan
    notes = [point.unreachable]
    if quality is None and not point.unreachable:
        notes.append("Not scored yet; run bh-routing sweep again to finish.")
    if quality:
        notes.append(quality.note)
    for name in REFERENCES:
        notes.append(_found(overall, point, name).note)
    # Static top-k isn't tested, and both references may have the same reason.
    note = " ".join(dict.fromkeys(filter(None, notes)))
    return SweepRow(
        rule=point.rule,
        variant=point.variant,
        knob=point.knob,
        budget=point.budget,
        mean_experts=mean,
        delta_nll=quality.delta_nll if quality else nan,
        delta_nll_low=quality.delta_nll_low if quality else nan,
        delta_nll_high=quality.delta_nll_high if quality else nan,
        perplexity_ratio=quality.perplexity_ratio if quality else nan,
        kl_mean=quality.kl_mean if quality else nan,
        same_top1_share=quality.same_top1_share if quality else nan,
        config_name=point.config_name,
        knob_field=point.knob_field,
        calibration_mean_experts=point.calibration_mean_experts,
        corrections=point.corrections,
        is_curve_only=point.is_curve_only,
        off_budget=abs(mean / point.budget - 1) > OFF_BUDGET,
        domains=len(by_domain),
        tokens=quality.tokens if quality else 0,
        documents=quality.documents if quality else 0,
        clusters=quality.clusters if quality else 0,
        method=quality.method if quality else "",
        note=note,
        **_against(point, overall, by_domain),
    )


def _found(compared: Comparisons, point: SweepPoint, reference: str) -> EqualCost:
    return compared.get((point.config_name, reference), EqualCost())


def _against(
    point: SweepPoint, overall: Comparisons, by_domain: Mapping[str, Comparisons]
) -> dict[str, Any]:
    """Return the columns of all references."""
    columns: dict[str, Any] = {}
    for name in REFERENCES:
        found = _found(overall, point, name)
        columns |= {
            f"{name}_at_mean": found.at_mean,
            f"{name}_geometric": found.geometric,
            f"{name}_difference": found.difference,
            f"{name}_low": found.low,
            f"{name}_high": found.high,
            f"{name}_p": found.p,
            f"{name}_p_corrected": found.p_corrected,
            f"{name}_saved": found.share_saved,
            f"{name}_saved_low": found.share_low,
            f"{name}_saved_high": found.share_high,
            f"{name}_domains": sum(
                _found(compared, point, name).difference < 0 for compared in by_domain.values()
            ),
            f"beats_{name}": found.answer,
        }
    return columns


def _domain_row(
    point: SweepPoint,
    quality: QualityRow,
    text: ScoredText,
    domain: str,
    compared: Comparisons,
) -> DomainRow:
    part = quality.by_domain[domain]
    against = {name: _found(compared, point, name) for name in REFERENCES}
    mean = math.nan
    if point.config_name in text.names:
        kept_D = text.experts_DC[:, text.names.index(point.config_name)]
        mean = float(kept_D.sum() / text.tokens_D.sum())
    return DomainRow(
        rule=point.rule,
        variant=point.variant,
        budget=point.budget,
        domain=domain,
        mean_experts=mean,
        drift=mean - quality.mean_experts,
        delta_nll=part.delta_nll,
        delta_nll_low=part.low,
        delta_nll_high=part.high,
        tokens=part.tokens,
        documents=part.documents,
        config_name=point.config_name,
        note=" ".join(
            dict.fromkeys(filter(None, [part.note, *(one.note for one in against.values())]))
        ),
        **{
            f"{name}_{column}": value
            for name, one in against.items()
            for column, value in (
                ("at_mean", one.at_mean),
                ("difference", one.difference),
                ("low", one.low),
                ("high", one.high),
                ("saved", one.share_saved),
            )
        },
    )


def _winners(rows: Sequence[SweepRow]) -> tuple[Winner, ...]:
    tested = [r for r in rows if not (r.rule in (STATIC, *CONTROLS) or r.is_curve_only)]
    budgets = sorted({row.budget for row in tested}, reverse=True)
    contests = (ALL_RULES, *(rule for rule in BH_RULES if any(r.rule == rule for r in tested)))
    return tuple(
        _winner(budget, among, [row for row in tested if row.budget == budget])
        for budget in budgets
        for among in contests
    )


def _winner(budget: float, among: str, rows: Sequence[SweepRow]) -> Winner:
    compared = [
        row for row in rows if among in (ALL_RULES, row.rule) and math.isfinite(row.top_k_saved)
    ]
    if not compared:
        return Winner(budget=budget, among=among)
    # Not by loss alone: means differ by a few percent within a budget.
    ranked = sorted(compared, key=lambda row: -row.top_k_saved)
    best = ranked[0]
    return Winner(
        budget=budget,
        among=among,
        beats_top_k=best.beats_top_k,
        beats_top_p=best.beats_top_p,
        beats_per_layer_top_k=best.beats_per_layer_top_k,
        runner_up=ranked[1].config_name if len(ranked) > 1 else "",
        row=best,
    )
