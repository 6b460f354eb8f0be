"""What the quality phase measured, as rows that the report and the plots can show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from bh_routing.analysis.estimates import NON_INFERIORITY_MARGIN
from bh_routing.analysis.quality import analyze_quality
from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.results import load_results
from bh_routing.records import QUALITY_JOURNAL
from bh_routing.report.text import as_float

Answer = Literal["yes", "no", "undecided", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """One configuration on the evaluation text, against the model's own top-k; NaN is unknown."""

    name: str
    rule: str
    """Name of its rule in the catalog; empty if an older run doesn't say."""
    mean_experts: float
    tokens: float
    documents: float
    nll: float
    delta_nll: float
    """NLL of the configuration minus that of the model's own top-k, nats a token."""
    low: float
    high: float
    upper: float
    """One-sided 95 % upper bound of delta_nll."""
    perplexity_ratio: float
    ratio_low: float
    ratio_high: float
    kl_mean: float
    kl_p99: float
    same_top1_share: float
    rms_delta_p: float
    top_k_overlap: float
    p_corrected: float
    detectable: float
    """delta_nll that a test on as many documents would find four times in five."""
    early: float
    """delta_nll on early positions of a window."""
    late: float
    verdict: str
    is_reference: bool
    """Whether every token came out as under the model's own top-k."""
    note: str
    against_static: Answer = "unknown"
    """Whether it loses less than static top-k at its own mean: decided by the interval of the
    difference, never by its sign."""

    @property
    def is_static(self) -> bool:
        """Whether its rule is static top-k: a point of the reference curve."""
        return self.rule == STATIC


def quality_rows(summary: Mapping[str, Any] | None) -> list[QualityRow]:
    """Read the quality records of a summary; empty if quality was not measured."""
    records = _block(summary).get("rules")
    rows = [_row(record) for record in records or [] if isinstance(record, Mapping)]
    rows = [row for row in rows if math.isfinite(row.delta_nll)]
    compared = _block(summary).get("static_top_k")
    tested = compared if isinstance(compared, Mapping) else {}
    return [replace(row, against_static=_against_static(row, rows, tested)) for row in rows]


def _against_static(row: QualityRow, rows: list[QualityRow], tested: Mapping[str, Any]) -> Answer:
    """Take the paired test of the analysis; without one, compare intervals, which is stricter."""
    if row.is_static:
        return "unknown"
    if row.name in tested:
        found = tested[row.name]
        answer = found.get("answer") if isinstance(found, Mapping) else None
        return answer if answer in ("yes", "no", "undecided") else "unknown"
    curve = [r for r in rows if (r.tokens, r.documents) == (row.tokens, row.documents)]
    ends = row.low, row.high, *(reference_at(curve, row.mean_experts, f) for f in ("low", "high"))
    if not all(map(math.isfinite, ends)):
        return "unknown"
    low, high, static_low, static_high = ends
    return "yes" if high < static_low else "no" if low > static_high else "undecided"


def with_quality(summary: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """Add the quality block to a summary that lacks it, from the scored documents in the folder.

    A user's own analysis may return a summary without one; quality still comes first. The block of
    an older run doesn't say which rules are static top-k, and is made again.
    """
    rows = _block(summary).get("rules")
    is_whole = summary.get("quality") is not None and all("rule" in row for row in rows or [])
    if is_whole or not (folder / QUALITY_JOURNAL).is_file():
        return summary
    records = load_results(folder).quality
    return {**summary, "quality": analyze_quality(records)} if records else summary


def margin_of(summary: Mapping[str, Any] | None) -> float:
    """The non-inferiority margin in nats; the usual one unless the summary names another."""
    margin = as_float(_block(summary).get("margin"))
    return margin if margin > 0 else NON_INFERIORITY_MARGIN


def reference_at(rows: list[QualityRow], mean_experts: float, field: str = "delta_nll") -> float:
    """The delta_nll of static top-k at this mean, on the line between its neighbours.

    Between k and k + 1 the line is what mixing the two at random by token gives. NaN outside the
    numbers of experts that were scored.
    """
    curve = sorted((row.mean_experts, getattr(row, field)) for row in rows if row.is_static)
    for (x0, y0), (x1, y1) in pairwise(curve):
        # Wider gaps aren't bridged: the curve bends, and a chord would flatter whatever is above.
        if x0 <= mean_experts <= x1 and 0 < x1 - x0 <= 1.0 + 1e-9:
            return float(y0 + (y1 - y0) * (mean_experts - x0) / (x1 - x0))
    return math.nan


def _block(summary: Mapping[str, Any] | None) -> Mapping[str, Any]:
    quality = (summary or {}).get("quality")
    return quality if isinstance(quality, Mapping) else {}


def _row(record: Mapping[str, Any]) -> QualityRow:
    def value(name: str) -> float:
        return as_float(record.get(name))

    def part(name: str) -> float:
        by_position = record.get("by_position")
        found = by_position.get(name) if isinstance(by_position, Mapping) else None
        return as_float(found.get("delta_nll")) if isinstance(found, Mapping) else math.nan

    delta = value("delta_nll")
    return QualityRow(
        name=str(record.get("config_name", "")),
        rule=str(record.get("rule") or ""),
        mean_experts=value("mean_experts"),
        tokens=value("tokens"),
        documents=value("documents"),
        nll=value("nll"),
        delta_nll=delta,
        low=value("delta_nll_low"),
        high=value("delta_nll_high"),
        upper=value("delta_nll_upper"),
        perplexity_ratio=_ratio(record.get("perplexity_ratio"), delta),
        ratio_low=_ratio(record.get("perplexity_ratio_low"), value("delta_nll_low")),
        ratio_high=_ratio(record.get("perplexity_ratio_high"), value("delta_nll_high")),
        kl_mean=value("kl_mean"),
        kl_p99=value("kl_p99"),
        same_top1_share=value("same_top1_share"),
        rms_delta_p=value("rms_delta_p"),
        top_k_overlap=value("top_k_overlap"),
        p_corrected=value("p_corrected"),
        detectable=value("minimum_detectable_delta_nll"),
        early=part("early"),
        late=part("late"),
        verdict=str(record.get("verdict") or "unknown"),
        is_reference=bool(record.get("is_reference", False)),
        note=str(record.get("note") or ""),
    )


def _ratio(stored: object, delta_nll: float) -> float:
    ratio = as_float(stored)
    return ratio if math.isfinite(ratio) else math.exp(min(delta_nll, 50.0))
