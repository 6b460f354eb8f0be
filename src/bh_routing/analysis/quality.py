"""Compute the quality table from scored documents: the cost of each rule, with intervals.

`analyze_quality` returns the block `quality` of `analysis_summary.json`:

    schema_version, margin, confidence, resamples, seed, correction, exploratory, definitions,
    kl_resolution, notes
    rules           [one dict per configuration, with the fields of QualityRow]
    static_top_k    {name: the fields of EqualCost against static top-k, and `answer`}
    load_balance    {name: {num_tokens, mean_experts, measures: {measure: {by_layer, mean, pooled,
                    noise_by_layer, noise, noise_pooled, noise_sd}}, note}}

Axes: D documents, R rules, L layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final, NamedTuple

import numpy as np

from bh_routing.analysis.quality_row import (
    RESOLUTION,
    STATIC,
    QualityRow,
    QualitySlice,
    histogram_quantile,
    in_order,
    mean_distinct,
    quality_definitions,
)
from bh_routing.analysis.sweep_equal_cost import compare_with_static
from bh_routing.errors import InputError
from bh_routing.results.files import to_strict
from bh_routing.results.records import SCHEMA_VERSION, QualityRecord
from bh_routing.stats.bootstrap import RESAMPLES
from bh_routing.stats.clustered import (
    NON_INFERIORITY_MARGIN,
    RatioEstimate,
    estimate_ratio,
    minimum_detectable_effect,
    non_inferiority,
)
from bh_routing.stats.load_balance import MEASURES, measure_load
from bh_routing.stats.paired import BH_LABEL, benjamini_hochberg_exploratory, holm

CONFIDENCE: Final = 0.95
REFERENCE_NOTE: Final = "The same as the model's own top-k on every token: nothing to test."


class QualityOptions(NamedTuple):
    """Options of the quality table."""

    margin: float = NON_INFERIORITY_MARGIN
    """Non-inferiority margin: largest tolerated increase of NLL, in nats per token."""
    resamples: int = RESAMPLES
    seed: int = 0


DEFAULT_OPTIONS: Final = QualityOptions()


def analyze_quality(
    records: Iterable[QualityRecord], options: QualityOptions = DEFAULT_OPTIONS
) -> dict[str, Any]:
    """Build the `quality` block of the summary from scored documents.

    Args:
        records: one per configuration and document.
        options: margin, resamples and seed.
    Returns:
        The dict described at the top of this file, ready for strict JSON.
    Raises:
        InputError: as `quality_table`.
    """
    by_rule = _by_rule(records)
    rows = _table(by_rule, options)
    tokens = {row.tokens for row in rows}
    notes = []
    if len(tokens) > 1:
        notes.append(
            "The configurations weren't scored on the same tokens: an unfinished run? Each is "
            "compared with top-k on its own tokens."
        )
    block = {
        "schema_version": SCHEMA_VERSION,
        "margin": options.margin,
        "confidence": CONFIDENCE,
        "resamples": options.resamples,
        "seed": options.seed,
        "correction": "Holm over rules",
        "exploratory": BH_LABEL,
        "definitions": quality_definitions() | MEASURES,
        "kl_resolution": RESOLUTION,
        "notes": notes,
        "rules": rows,
        "static_top_k": _against_static(by_rule, options),
        "load_balance": {
            name: measure_load(
                _total(own, "expert_load"), _total(own, "count_histogram"), seed=options.seed
            )
            for name, own in by_rule.items()
        },
    }
    strict: dict[str, Any] = to_strict(block)
    return strict


def _against_static(
    by_rule: Mapping[str, Sequence[QualityRecord]], options: QualityOptions
) -> dict[str, dict[str, Any]]:
    static = [name for name, own in by_rule.items() if own[0].rule.get("method") == STATIC]
    compared = compare_with_static(
        [record for own in by_rule.values() for record in own],
        static,
        resamples=options.resamples,
        seed=options.seed,
    )
    return {name: {**asdict(found), "answer": found.answer} for name, found in compared.items()}


def quality_table(
    records: Iterable[QualityRecord], options: QualityOptions = DEFAULT_OPTIONS
) -> list[QualityRow]:
    """Compare every rule with the model's own top-k, with documents as units.

    Rules scored on the same documents share bootstrap resamples. A rule that scores every token as
    top-k does is the reference: its differences are 0 by definition, with intervals [0, 0]; it has
    no p and takes no part in the corrections.

    Args:
        records: one per configuration and document; the last of duplicates counts.
        options: margin, resamples and seed.
    Returns:
        One row per configuration, in order of first appearance.
    Raises:
        InputError: a configuration has no scored token or two rules, or the margin isn't positive.
    """
    return _table(_by_rule(records), options)


def _table(
    by_rule: Mapping[str, Sequence[QualityRecord]], options: QualityOptions
) -> list[QualityRow]:
    rows = [_row(name, own, options) for name, own in by_rule.items()]
    p = holm([row.p for row in rows])
    p_exploratory = benjamini_hochberg_exploratory([row.p for row in rows])
    harm_p = holm([row.non_inferiority_p for row in rows])
    return [
        replace(
            row,
            p_corrected=float(p[i]),
            p_exploratory=float(p_exploratory[i]),
            non_inferiority_p_corrected=float(harm_p[i]),
        )
        for i, row in enumerate(rows)
    ]


def _by_rule(records: Iterable[QualityRecord]) -> dict[str, list[QualityRecord]]:
    """Group records with scored tokens by configuration, documents sorted to align the draws."""
    by_rule: dict[str, dict[str, QualityRecord]] = defaultdict(dict)
    rules: dict[str, Mapping[str, Any]] = {}
    for record in records:
        if rules.setdefault(record.config_name, record.rule) != record.rule:
            raise InputError(f"{record.config_name!r} stands for two rules; give each its own name")
        by_rule[record.config_name][record.document_key] = record
    scored = {
        name: sorted((r for r in own.values() if r.tokens > 0), key=in_order)
        for name, own in by_rule.items()
    }
    empty = [name for name, own in scored.items() if not own]
    if empty:
        raise InputError(f"no token was scored under {', '.join(empty)}; score a longer text")
    return scored


def _row(name: str, records: Sequence[QualityRecord], options: QualityOptions) -> QualityRow:
    estimate = _estimate(
        records,
        [
            [
                r.nll_sum - r.top_k_nll_sum,
                r.kl_sum,
                r.same_top1,
                r.nll_sum,
                r.top_k_nll_sum,
                r.delta_p_sum,
                r.delta_p_square_sum,
                r.experts_sum * r.tokens / r.units,
            ]
            for r in records
        ],
        [r.tokens for r in records],
        options,
    )
    _, kl, same, nll, top_k_nll, delta_p, delta_p_square, experts = estimate.estimate_R.tolist()
    low, high = (ends.tolist() for ends in estimate.interval(CONFIDENCE))
    row = QualityRow(
        config_name=name,
        rule=str(records[0].rule.get("method", "")),
        is_reference=False,
        mean_experts=experts,
        tokens=sum(r.tokens for r in records),
        documents=len({r.document for r in records}),
        clusters=estimate.num_clusters,
        nll=nll,
        top_k_nll=top_k_nll,
        perplexity=_exp(nll),
        kl_mean=kl,
        kl_mean_low=_within(low[1], math.inf),
        kl_mean_high=high[1],
        same_top1_share=same,
        same_top1_share_low=_within(low[2], 1.0),
        same_top1_share_high=_within(high[2], 1.0),
        mean_delta_p=delta_p,
        rms_delta_p=math.sqrt(delta_p_square),
        by_position=_by_position(records, options),
        by_domain=_by_domain(records, options),
        method=estimate.method,
        note=_note(estimate),
        **_difference(estimate, options.margin),
        **_divergence_tail(records),
        **_experts(records),
    )
    same_everywhere = all(r.kl_max == 0 and r.nll_sum == r.top_k_nll_sum for r in records)
    return _as_reference(row) if same_everywhere else row


def _difference(estimate: RatioEstimate, margin: float) -> dict[str, Any]:
    """Return the fields on delta_nll, the first column of the estimate."""
    delta, se = float(estimate.estimate_R[0]), float(estimate.se_R[0])
    low, high = (float(end[0]) for end in estimate.interval(CONFIDENCE))
    upper, harm_p = (float(column[0]) for column in non_inferiority(estimate, margin))
    low_90 = float(estimate.interval(0.90).low_R[0])
    return {
        "delta_nll": delta,
        "delta_nll_low": low,
        "delta_nll_high": high,
        "delta_nll_se": se,
        "p": float(estimate.p_different(0.0)[0]),
        "p_corrected": math.nan,
        "p_exploratory": math.nan,
        "perplexity_ratio": _exp(delta),
        "perplexity_ratio_low": _exp(low),
        "perplexity_ratio_high": _exp(high),
        "margin": margin,
        "delta_nll_upper": upper,
        "non_inferior": upper <= margin,
        "non_inferiority_p": harm_p,
        "non_inferiority_p_corrected": math.nan,
        "verdict": _verdict(low_90, upper, margin),
        "minimum_detectable_delta_nll": minimum_detectable_effect(se, estimate.num_clusters),
    }


def _divergence_tail(records: Sequence[QualityRecord]) -> dict[str, Any]:
    histogram = _total(records, "kl_histogram")
    kl_max = max(r.kl_max for r in records)
    levels = {"kl_median": 0.5, "kl_p95": 0.95, "kl_p99": 0.99}
    quantiles = {name: histogram_quantile(histogram, q, kl_max) for name, q in levels.items()}
    return quantiles | {"kl_max": kl_max}


def _experts(records: Sequence[QualityRecord]) -> dict[str, Any]:
    tokens = sum(r.tokens for r in records)
    overlap_L = _total(records, "jaccard_sum") / tokens
    kept_L = _total(records, "expert_load").sum(axis=1) / tokens
    return {
        "top_k_overlap": float(overlap_L.mean()),
        "top_k_overlap_by_layer": tuple(overlap_L.tolist()),
        "experts_by_layer": tuple(kept_L.tolist()),
        "mean_distinct_experts": mean_distinct(records),
    }


def _as_reference(row: QualityRow) -> QualityRow:
    return replace(
        row,
        is_reference=True,
        delta_nll_low=0.0,
        delta_nll_high=0.0,
        delta_nll_se=0.0,
        perplexity_ratio_low=1.0,
        perplexity_ratio_high=1.0,
        kl_mean_low=0.0,
        kl_mean_high=0.0,
        same_top1_share_low=1.0,
        same_top1_share_high=1.0,
        delta_nll_upper=0.0,
        non_inferior=True,
        p=math.nan,
        non_inferiority_p=math.nan,
        verdict=_verdict(0.0, 0.0, row.margin),
        by_position={k: _exactly_zero(part) for k, part in row.by_position.items()},
        by_domain={k: _exactly_zero(part) for k, part in row.by_domain.items()},
        note=REFERENCE_NOTE,
    )


def _exactly_zero(part: QualitySlice) -> QualitySlice:
    return replace(part, low=0.0, high=0.0, note="") if part.tokens else part


def _verdict(low_90: float, upper: float, margin: float) -> str:
    if math.isnan(upper):
        return "unknown"
    if upper <= margin:
        return "within margin"
    return "beyond margin" if low_90 > margin else "undecided"


def _note(estimate: RatioEstimate) -> str:
    if estimate.note:
        return estimate.note
    if not estimate.se_R[0] > 0:
        return "Every document shows the same difference: with no spread there is no test."
    if math.isnan(float(estimate.interval(CONFIDENCE).low_R[0])):
        return "Too few documents carry the whole difference: no interval and no test."
    return ""


def _estimate(
    records: Sequence[QualityRecord],
    values_DR: Sequence[Sequence[float]],
    weights_D: Sequence[float],
    options: QualityOptions,
) -> RatioEstimate:
    clusters_D, draws_D = [r.cluster for r in records], [r.draw for r in records]
    sampling = {"resamples": options.resamples, "seed": options.seed}
    return estimate_ratio(values_DR, weights_D, clusters_D, draws=draws_D, **sampling)


def _by_position(
    records: Sequence[QualityRecord], options: QualityOptions
) -> dict[str, QualitySlice]:
    early = [(r.early_delta_nll_sum, r.early_tokens) for r in records]
    late = [
        (r.nll_sum - r.top_k_nll_sum - r.early_delta_nll_sum, r.tokens - r.early_tokens)
        for r in records
    ]
    return {"early": _slice(records, early, options), "late": _slice(records, late, options)}


def _by_domain(
    records: Sequence[QualityRecord], options: QualityOptions
) -> dict[str, QualitySlice]:
    parts: dict[str, list[QualityRecord]] = defaultdict(list)
    for record in records:
        parts[record.domain].append(record)
    return {
        domain: _slice(own, [(r.nll_sum - r.top_k_nll_sum, r.tokens) for r in own], options)
        for domain, own in sorted(parts.items())
    }


def _slice(
    records: Sequence[QualityRecord],
    sums: Sequence[tuple[float, int]],
    options: QualityOptions,
) -> QualitySlice:
    tokens = sum(weight for _, weight in sums)
    if tokens == 0:
        unknown = dict.fromkeys(("delta_nll", "low", "high"), math.nan)
        return QualitySlice(tokens=0, documents=0, note="No tokens here.", **unknown)
    estimate = _estimate(records, [[v] for v, _ in sums], [w for _, w in sums], options)
    low, high = (float(end[0]) for end in estimate.interval(CONFIDENCE))
    return QualitySlice(
        tokens=tokens,
        documents=len({r.document for r, (_, weight) in zip(records, sums, strict=True) if weight}),
        delta_nll=float(estimate.estimate_R[0]),
        low=low,
        high=high,
        note=_note(estimate),
    )


def _total(records: Sequence[QualityRecord], name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sum a nested field over documents; histograms of expert counts may differ in width."""
    arrays = [np.asarray(getattr(record, name), dtype=np.float64) for record in records]
    widest = max(array.shape[-1] for array in arrays)
    total = np.zeros((*arrays[0].shape[:-1], widest))
    for array in arrays:
        total[..., : array.shape[-1]] += array
    return total


def _within(end: float, most: float) -> float:
    # An interval can exceed the possible range, 0 to `most`; NaN stays NaN.
    return end if math.isnan(end) else min(max(end, 0.0), most)


def _exp(value: float) -> float:
    # Far beyond any real loss; JSON has no infinity.
    return math.exp(value) if value < 700 else math.nan
