"""Rows of the quality table, and the records that they are computed from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike

from bh_routing.errors import InputError
from bh_routing.results.journal import Journal, parse_quality
from bh_routing.results.records import KL_BIN_EDGES, QualityRecord, column, json_digest

STATIC: Final = "top_k"
"""Name of static top-k in the catalog of rules."""
RESOLUTION: Final = KL_BIN_EDGES[1] / KL_BIN_EDGES[0]
"""Ratio of the two edges of a bin: the largest error of a quantile, as a factor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualitySlice:
    """Loss on a subset of the tokens: early or late positions, or one domain."""

    tokens: int
    documents: int
    delta_nll: float
    low: float
    high: float
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """Cost of one rule compared with the model's own top-k, on the same tokens.

    NaN means unknown, and `note` gives the reason. Intervals are over documents, by `method`.
    """

    config_name: str = column("Name of the routing configuration.")
    rule: str = column("Name of its rule in the catalog; top_k is static top-k.")
    is_reference: bool = column("Every token came out as under the model's own top-k.")
    mean_experts: float = column("Mean experts kept, over scored tokens and layers.")
    mean_distinct_experts: float = column(
        "Mean number of distinct experts in a decode step and layer, over scored tokens; NaN "
        "without emulated decode steps."
    )
    tokens: int = column("Scored tokens; in emulated decode steps, of all draws of companions.")
    documents: int = column("Documents with a scored token.")
    clusters: int = column("Independent clusters of documents: the chapters of a book are one.")
    nll: float = column("Negative log-likelihood, nats per token.")
    top_k_nll: float = column("The same under the model's own top-k.")
    delta_nll: float = column("nll - top_k_nll: the sum over documents over the sum of tokens.")
    delta_nll_low: float = column("Lower end of its 95 % interval.")
    delta_nll_high: float = column("Upper end of its 95 % interval.")
    delta_nll_se: float = column("Its cluster-robust standard error.")
    p: float = column("Two-sided p of delta_nll = 0, uncorrected.")
    p_corrected: float = column("p after Holm's correction over the rules.")
    p_exploratory: float = column("p adjusted by Benjamini-Hochberg, for exploring only.")
    perplexity: float = column("exp(nll).")
    perplexity_ratio: float = column("exp(delta_nll): 1.01 is one per cent more perplexity.")
    perplexity_ratio_low: float = column("exp(delta_nll_low).")
    perplexity_ratio_high: float = column("exp(delta_nll_high).")
    kl_mean: float = column("KL(top-k || rule) over the full vocabulary, nats per token.")
    kl_mean_low: float = column("Lower end of its 95 % interval.")
    kl_mean_high: float = column("Upper end of its 95 % interval.")
    kl_median: float = column("Median over tokens, from a histogram: right to a factor of 1.33.")
    kl_p95: float = column("95 % quantile over tokens, likewise.")
    kl_p99: float = column("99 % quantile over tokens, likewise.")
    kl_max: float = column("Largest KL of a token, exact.")
    same_top1_share: float = column("Fraction of tokens where both rank the same token first.")
    same_top1_share_low: float = column("Lower end of its 95 % interval.")
    same_top1_share_high: float = column("Upper end of its 95 % interval.")
    mean_delta_p: float = column("Mean change of the correct token's probability.")
    rms_delta_p: float = column("Root mean square of that change.")
    margin: float = column("Non-inferiority margin, nats per token.")
    delta_nll_upper: float = column("One-sided 95 % upper bound of delta_nll.")
    non_inferior: bool = column(
        "delta_nll_upper <= margin; false where unknown, which isn't a finding of harm."
    )
    non_inferiority_p: float = column("One-sided p of delta_nll >= margin, uncorrected.")
    non_inferiority_p_corrected: float = column("The same after Holm's correction over rules.")
    verdict: str = column(
        "within margin: the upper bound is; beyond margin: the one-sided 95 % lower bound is "
        "above it; undecided: neither; unknown: no interval."
    )
    minimum_detectable_delta_nll: float = column(
        "True delta_nll that a two-sided 5 % test on as many clusters finds four times in five."
    )
    top_k_overlap: float = column(
        "Jaccard overlap of the kept experts with top-k's own, over tokens and layers."
    )
    top_k_overlap_by_layer: tuple[float, ...] = column("The same for each layer.")
    experts_by_layer: tuple[float, ...] = column("Mean experts kept in each layer.")
    by_position: Mapping[str, QualitySlice] = column(
        "early: the first 128 positions of a window, as after a short prompt; late: the others, "
        "where earlier drops have had time to compound."
    )
    by_domain: Mapping[str, QualitySlice] = column("Loss by domain of the text.")
    method: str = column("Where intervals and p come from.")
    note: str = column("The missing values and the reason; empty if none is missing.")

    @property
    def is_static(self) -> bool:
        """Whether the rule is static top-k: a point of the reference curve."""
        return self.rule == STATIC

    def loss_at(self, position: str) -> float:
        """Return delta_nll at early or late positions of a window; NaN if unknown."""
        return self.by_position[position].delta_nll if position in self.by_position else math.nan


def read_rows(records: Iterable[object]) -> list[QualityRow]:
    """Build rows from JSON; a missing or null column is unknown."""
    return [_read(record) for record in records if isinstance(record, Mapping)]


def _read(record: Mapping[str, Any]) -> QualityRow:
    delta = _float(record.get("delta_nll"))
    ratios = {
        f"perplexity_ratio{end}": math.exp(min(_float(record.get(f"delta_nll{end}")), 50.0))
        for end in ("", "_low", "_high")
    }
    unknown = {"delta_nll": delta, "verdict": "unknown", **ratios}
    read = {
        f.name: _read_cell(str(f.type), record.get(f.name), unknown.get(f.name))
        for f in fields(QualityRow)
    }
    return QualityRow(**read)


def _read_cell(kind: str, given: Any, unknown: Any) -> Any:
    """Convert a value to a field's type; `unknown` stands for a missing one."""
    match kind:
        case "float":
            known = _float(given)
            return known if math.isfinite(known) else math.nan if unknown is None else unknown
        case "int":
            return int(given or 0)
        case "bool":
            return bool(given)
        case "str":
            return str(given or unknown or "")
        case "tuple[str, ...]":
            return tuple(given or ())
    parts = given.items() if isinstance(given, Mapping) else ()
    return {name: _read_slice(part) for name, part in parts if isinstance(part, Mapping)}


def _read_slice(part: Mapping[str, Any]) -> QualitySlice:
    delta, low, high = (_float(part.get(name)) for name in ("delta_nll", "low", "high"))
    counts = {name: int(part.get(name) or 0) for name in ("tokens", "documents")}
    note = str(part.get("note") or "")
    return QualitySlice(delta_nll=delta, low=low, high=high, note=note, **counts)


def _float(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def quality_definitions() -> dict[str, str]:
    """Map each column of the quality table to its definition."""
    return {f.name: str(f.metadata["definition"]) for f in fields(QualityRow)}


def read_quality(path: Path) -> tuple[QualityRecord, ...]:
    """Read every scored document; the last of duplicates (name, rule, document) counts.

    Older files have neither the rule nor the document's key: the rule of their records is empty,
    and the document's name replaces the key.

    A line holds a record's fields, directly or under `record`; lines with a `header` are skipped.

    Raises:
        ResultsError: a line isn't a complete record of this schema.
    """
    records = {
        (record.config_name, json_digest(record.rule), record.document_key): record
        for record in Journal.read(path, _parse).items
        if record is not None
    }
    return tuple(records.values())


def _parse(body: dict[str, Any]) -> QualityRecord | None:
    return None if "header" in body else parse_quality(body.get("record", body))


def mean_distinct(records: Sequence[QualityRecord]) -> float:
    """Return the mean distinct experts of a decode step; NaN without emulated decode steps."""
    sums = [record.distinct_experts_sum for record in records]
    if None in sums:
        return math.nan
    return sum(filter(None, sums)) / sum(record.units for record in records)


def in_order(record: QualityRecord) -> tuple[str, str]:
    """Return a sort key: the document's name, then its key."""
    return record.document, record.document_key


def histogram_quantile(counts: ArrayLike, level: float, maximum: float) -> float:
    """Return a quantile of the tokens' KL from a histogram over KL_BIN_EDGES.

    Interpolation is log-linear within a bin, so the error is at most one bin's width, RESOLUTION,
    and usually far less.

    Args:
        counts: tokens below the first edge, between each two edges, above the last.
        level: level of the quantile, in [0, 1].
        maximum: the largest observed value, stored exactly; it bounds the result.
    Returns:
        The quantile in nats, interpolated linearly below the first edge; NaN without tokens, or
        if the largest value is NaN.
    Raises:
        InputError: the number of bins doesn't fit the edges, or the level isn't in [0, 1].
    Example:
        >>> counts = [0] * 82
        >>> counts[57] = 10                      # ten tokens between 1e-1 and 1.33e-1 nats
        >>> round(histogram_quantile(counts, 0.5, maximum=0.13), 4)
        0.1155
    """
    if not 0 <= level <= 1:
        raise InputError(f"a quantile's level must be in [0, 1], got {level}")
    counts_B = np.asarray(counts, dtype=np.float64)
    if len(counts_B) != len(KL_BIN_EDGES) + 1:
        raise InputError(
            f"the histogram has {len(counts_B)} bins, this version keeps {len(KL_BIN_EDGES) + 1}; "
            "score again"
        )
    total = float(counts_B.sum())
    if total == 0 or math.isnan(maximum):
        return math.nan
    reached_B = np.cumsum(counts_B)
    rank = level * total
    bin_index = int(np.flatnonzero((reached_B >= rank) & (counts_B > 0))[0])
    share = (rank - (reached_B[bin_index] - counts_B[bin_index])) / counts_B[bin_index]
    if bin_index == 0:
        value = share * KL_BIN_EDGES[0]
    else:
        low = KL_BIN_EDGES[bin_index - 1]
        high = KL_BIN_EDGES[bin_index] if bin_index < len(KL_BIN_EDGES) else max(low, maximum)
        value = low * (high / low) ** share
    return min(float(value), maximum)
