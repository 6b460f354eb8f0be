"""Scores of tokens under a rule, and their sums over a document, which become its record.

Axes: T tokens, V vocabulary, L layers, K candidate slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bh_routing.engine.windows import TokenizedDocument
from bh_routing.models.trace import DROPPED, count_experts
from bh_routing.results.records import EARLY_POSITIONS, KL_BIN_EDGES, QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import rule_to_config

Floats = NDArray[np.floating[Any]]


class TokenScores(NamedTuple):
    """Comparison of each scored token; float32 or bool, shape (T,)."""

    nll_T: Tensor
    top_k_nll_T: Tensor
    kl_T: Tensor
    """KL(top-k || rule) in nats; may be slightly negative due to rounding."""
    same_top1_T: Tensor
    delta_p_T: Tensor


class Prediction(NamedTuple):
    """The baseline's prediction of T tokens, computed once and compared with every rule."""

    log_probs_TV: Tensor
    """Float32."""
    probs_TV: Tensor
    is_zero_TV: Tensor | None
    """Where the probability is 0; None if it is nowhere."""
    top1_T: Tensor
    correct_T: Tensor
    """Log-probability of the correct next token."""
    targets_T: Tensor


def predict(logits_TV: Tensor, targets_T: Tensor) -> Prediction:
    """Return the prediction for logits of any float dtype."""
    log_probs_TV = logits_TV.float().log_softmax(-1)
    probs_TV = log_probs_TV.exp()
    is_zero_TV = probs_TV == 0
    return Prediction(
        log_probs_TV,
        probs_TV,
        is_zero_TV if bool(is_zero_TV.any()) else None,
        _argmax(logits_TV),
        log_probs_TV.gather(1, targets_T[:, None]).squeeze(1),
        targets_T,
    )


def compare_predictions(top_k: Prediction, rule_logits_TV: Tensor) -> TokenScores:
    """Compare two predictions of the same tokens over the full vocabulary, in float32.

    Args:
        top_k: prediction of the model's own top-k.
        rule_logits_TV: logits under the rule, any float dtype, (T, V).
    Returns:
        Scores per token; comparing a prediction with itself gives a KL of exactly 0.
    """
    rule_TV = rule_logits_TV.float().log_softmax(-1)
    correct_T = rule_TV.gather(1, top_k.targets_T[:, None]).squeeze(1)
    # Differences first: separate sums would cancel to rounding noise.
    log_ratio_TV = torch.sub(top_k.log_probs_TV, rule_TV, out=rule_TV)
    if top_k.is_zero_TV is not None:
        # A token with probability 0 adds nothing, even if both logits are -inf.
        log_ratio_TV.masked_fill_(top_k.is_zero_TV, 0.0)
    return TokenScores(
        nll_T=-correct_T,
        top_k_nll_T=-top_k.correct_T,
        kl_T=torch.linalg.vecdot(top_k.probs_TV, log_ratio_TV),
        same_top1_T=top_k.top1_T == _argmax(rule_logits_TV),
        delta_p_T=correct_T.exp() - top_k.correct_T.exp(),
    )


def _argmax(logits_TV: Tensor) -> Tensor:
    """Return the first of each row's largest logits."""
    if logits_TV.device.type != "cpu":
        return logits_TV.argmax(-1)
    # Torch's is ten times slower on a CPU.
    return torch.from_numpy(logits_TV.float().numpy().argmax(-1))


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
