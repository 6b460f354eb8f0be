"""Sums over one document's scored tokens, which become its record."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bh_routing.engine.windows import (
    TokenizedDocument,
)
from bh_routing.models.trace import DROPPED, count_experts
from bh_routing.results.records import EARLY_POSITIONS, KL_BIN_EDGES, QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import rule_to_config

Floats = NDArray[np.floating[Any]]


class DocumentTally:
    """Float64 sums over one document's scored tokens under one rule."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_experts = num_experts
        self._sums = dict.fromkeys(
            ("nll", "top_k_nll", "kl", "delta_p", "delta_p_square", "early_delta_nll"), 0.0
        )
        self._tokens = self._early_tokens = self._same_top1 = 0
        self._kl_max = 0.0
        self._kl_histogram = np.zeros(len(KL_BIN_EDGES) + 1, dtype=np.int64)
        self._expert_load = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self._count_histogram = np.zeros((num_layers, num_experts + 1), dtype=np.int64)
        self._jaccard = np.zeros(num_layers)
        self._distinct: int | None = None

    def add(
        self,
        nll_T: Floats,
        top_k_nll_T: Floats,
        kl_T: Floats,
        same_top1_T: NDArray[np.bool_],
        delta_p_T: Floats,
        *,
        first_position: int,
        kept_index_TLK: Tensor,
        top_k_index_TLK: Tensor,
        distinct_TL: Tensor | None = None,
    ) -> None:
        """Add the scored tokens of one window; the first is at `first_position`."""
        if distinct_TL is not None:
            self._distinct = (self._distinct or 0) + int(distinct_TL.sum())
        kl_T = np.maximum(kl_T.astype(np.float64), 0.0)
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which the caller detects
            delta_nll_T = nll_T.astype(np.float64) - top_k_nll_T
        early = max(0, min(EARLY_POSITIONS - first_position, len(nll_T)))
        for name, values in {
            "nll": nll_T,
            "top_k_nll": top_k_nll_T,
            "kl": kl_T,
            "delta_p": delta_p_T,
            "delta_p_square": delta_p_T.astype(np.float64) ** 2,
            "early_delta_nll": delta_nll_T[:early],
        }.items():
            self._sums[name] += float(values.sum(dtype=np.float64))
        self._tokens += len(nll_T)
        self._early_tokens += early
        self._same_top1 += int(same_top1_T.sum())
        self._kl_max = float(kl_T.max(initial=self._kl_max))  # numpy's max propagates NaN
        bins = np.searchsorted(KL_BIN_EDGES, kl_T, side="right")
        self._kl_histogram += np.bincount(bins, minlength=len(self._kl_histogram))
        self._add_experts(kept_index_TLK, top_k_index_TLK)

    def _add_experts(self, kept_index_TLK: Tensor, top_k_index_TLK: Tensor) -> None:
        self._expert_load += count_experts(kept_index_TLK, self._num_experts)
        counts_TL = (kept_index_TLK != DROPPED).sum(-1).numpy()
        for layer, histogram in enumerate(self._count_histogram):
            histogram += np.bincount(counts_TL[:, layer], minlength=len(histogram))
        same_TL = (kept_index_TLK[..., :, None] == top_k_index_TLK[..., None, :]) & (
            kept_index_TLK[..., :, None] != DROPPED
        )
        both_TL = same_TL.sum((-1, -2)).numpy()
        top_k_TL = (top_k_index_TLK != DROPPED).sum(-1).numpy()
        self._jaccard += (both_TL / (counts_TL + top_k_TL - both_TL)).sum(0)

    def record(self, config_name: str, rule: Rule, document: TokenizedDocument) -> QualityRecord:
        """Return the finished record."""
        widest = int(np.flatnonzero(self._count_histogram.any(axis=0)).max(initial=0))
        return QualityRecord(
            config_name=config_name,
            rule=rule_to_config(rule),
            document=document.name,
            document_key=document.key,
            cluster=document.cluster,
            domain=document.domain,
            tokens=self._tokens,
            **{f"{name}_sum": value for name, value in self._sums.items()},
            kl_max=self._kl_max,
            kl_histogram=self._kl_histogram.tolist(),
            same_top1=self._same_top1,
            early_tokens=self._early_tokens,
            experts_sum=int(self._expert_load.sum()),
            units=self._tokens * len(self._jaccard),
            expert_load=self._expert_load.tolist(),
            count_histogram=self._count_histogram[:, : widest + 1].tolist(),
            jaccard_sum=self._jaccard.tolist(),
            distinct_experts_sum=self._distinct,
        )
