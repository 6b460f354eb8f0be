"""What the quality phase measured, as rows that the report and the plots can show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bh_routing.report.text import as_float


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRow:
    """One configuration on the evaluation text, against the model's own top-k."""

    name: str
    mean_experts: float
    tokens: float
    documents: float
    nll: float
    delta_nll: float
    """NLL of the configuration minus that of the model's own top-k, nats a token."""
    low: float
    high: float
    perplexity_ratio: float
    kl_mean: float
    kl_p99: float
    same_top1_share: float
    note: str

    @property
    def is_static(self) -> bool:
        """Whether it is a fixed number of experts: part of the reference curve."""
        return re.match(r"top_?k(?![a-z])", self.name, re.IGNORECASE) is not None

    @property
    def is_reference(self) -> bool:
        """Whether it is the model's own top-k itself."""
        return self.is_static and self.delta_nll == 0 and not (self.low < 0 or self.high > 0)


def quality_rows(summary: Mapping[str, Any] | None) -> list[QualityRow]:
    """Read the quality records of a summary; empty if quality was not measured."""
    quality = (summary or {}).get("quality")
    records = quality.get("rules") if isinstance(quality, Mapping) else quality
    if isinstance(records, Mapping):
        records = [{"config_name": name} | dict(record) for name, record in records.items()]
    rows = [_row(record) for record in records or [] if isinstance(record, Mapping)]
    return [row for row in rows if math.isfinite(row.delta_nll)]


def margin_of(summary: Mapping[str, Any] | None) -> float:
    """The non-inferiority margin in nats; ln 1.01 unless the summary names another."""
    quality = (summary or {}).get("quality")
    margin = as_float(quality.get("margin")) if isinstance(quality, Mapping) else math.nan
    return margin if math.isfinite(margin) else math.log(1.01)


def reference_at(rows: list[QualityRow], mean_experts: float) -> float:
    """ΔNLL of static top-k at this mean, on the line between its neighbours; NaN outside.

    Between k and k + 1 the line is what mixing the two at random by token gives on average.
    """
    curve = sorted((r.mean_experts, r.delta_nll) for r in rows if r.is_static)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= mean_experts <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (mean_experts - x0) / (x1 - x0)
    return math.nan


def _row(record: Mapping[str, Any]) -> QualityRow:
    numbers = {
        name: as_float(record.get(name))
        for name in (
            "mean_experts",
            "tokens",
            "documents",
            "nll",
            "delta_nll",
            "perplexity_ratio",
            "kl_mean",
            "kl_p99",
            "same_top1_share",
        )
    }
    if not math.isfinite(numbers["perplexity_ratio"]):
        numbers["perplexity_ratio"] = math.exp(min(numbers["delta_nll"], 50.0))
    return QualityRow(
        name=str(record.get("config_name", "")),
        low=as_float(record.get("delta_nll_low")),
        high=as_float(record.get("delta_nll_high")),
        note=str(record.get("note") or ""),
        **numbers,
    )
