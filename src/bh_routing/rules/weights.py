"""Selection of slots from counts, and weights of the kept slots."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.rules.base import Candidates, TemperatureWeights, WeightConvention

# Below any relevant sum of weights, and large enough for a finite quotient.
_SMALLEST_SUM: Final = 1e-30


class AliasedSlots(NamedTuple):
    """Slots in which dropped experts are replaced by a kept expert with weight 0."""

    top_k_index_TK: Tensor
    top_k_weights_TK: Tensor


def kept_weights(
    top_k_weights_TK: Tensor,
    keep_TK: Tensor,
    *,
    convention: WeightConvention,
    normalises: bool,
    temperature: float,
    router_logits_TE: Tensor,
    top_k_index_TK: Tensor,
    model_top_k: int,
    temperature_weights: TemperatureWeights = "mass",
) -> Tensor:
    """Compute the weights of the kept slots from the family's weights of all candidates.

    Conventions, at temperature 1:

    - "model": a family that renormalises does so over the kept slots, w * sum(all) / sum(kept),
      which preserves the family's scale; other families keep their raw weights.
    - "renormalize": the kept weights sum to 1.
    - "preserve_mass": the kept weights have the sum of the model's own top-k; the same as "model"
      in a family that renormalises.

    At another temperature T the kept slots share their sum at T = 1 in proportion to
    exp(logit / T). "raw" is the ablation without that rescaling: a softmax family's own weights
    for logits / T. Both are for softmax-scored families only.

    Args:
        top_k_weights_TK: the family's weights of the candidates, at temperature 1.
        keep_TK: bool, at least one True per token.
        convention: one of the three above.
        normalises: whether the family's top-k weights sum to a constant.
        temperature: T, above 0.
        router_logits_TE: the scores by which the family ranks experts.
        top_k_index_TK: int64 expert of each slot.
        model_top_k: the model's own k; less than K if the router was widened.
        temperature_weights: "mass" or "raw".
    Returns:
        Weights in the family's dtype, exactly 0 in dropped slots. No host sync.
    """
    weights_TK = top_k_weights_TK.to(torch.float32)
    is_tempered = temperature != 1.0
    if is_tempered and temperature_weights == "raw" and not normalises:
        # A family that normalises undoes the rescaling, so raw equals mass there.
        ratio_TK = _softmax_ratio(router_logits_TE, top_k_index_TK, temperature)
        weights_TK = weights_TK * ratio_TK
        is_tempered = False
    kept_TK = torch.where(keep_TK, weights_TK, 0.0)
    if convention == "renormalize":
        kept_TK = kept_TK / _sum(kept_TK)
    elif normalises:
        kept_TK = kept_TK * (_sum(weights_TK) / _sum(kept_TK))
    elif convention == "preserve_mass":
        is_own_TK = own_slots(router_logits_TE, top_k_index_TK, model_top_k)
        kept_TK = kept_TK * (_sum(torch.where(is_own_TK, weights_TK, 0.0)) / _sum(kept_TK))
    if is_tempered:
        kept_TK = tempered(
            kept_TK, keep_TK, router_logits_TE.gather(-1, top_k_index_TK), temperature
        )
    return kept_TK.to(top_k_weights_TK.dtype)


def tempered(kept_TK: Tensor, keep_TK: Tensor, logits_TK: Tensor, temperature: float) -> Tensor:
    """Distribute the sum of the kept weights in proportion to exp(logit / temperature).

    Args:
        kept_TK: weights, exactly 0 in dropped slots.
        keep_TK: bool, at least one True per token.
        logits_TK: the scores by which the family ranks experts, at the slots.
        temperature: above 0.
    Returns:
        Weights in float32, exactly 0 in dropped slots. No host sync.
    """
    tempered_TK = logits_TK.to(torch.float32) / temperature
    fraction_TK = tempered_TK.masked_fill(~keep_TK, float("-inf")).softmax(dim=-1)
    return fraction_TK * kept_TK.to(torch.float32).sum(dim=-1, keepdim=True)


def alias_dropped(top_k_index_TK: Tensor, weights_TK: Tensor, keep_TK: Tensor) -> AliasedSlots:
    """Give dropped slots weight 0 and the index of the token's best kept expert.

    Any implementation of the experts then computes the weighted sum without reading a dropped
    expert: the kept expert is repeated with weight 0.

    Args:
        top_k_index_TK: int64 expert of each slot.
        weights_TK: weight of each slot.
        keep_TK: bool, at least one True per token.
    Returns:
        Index and weights, of the same shapes and dtypes. No host sync.
    Example:
        >>> index, weights = alias_dropped(
        ...     torch.tensor([[7, 3, 5]]),
        ...     torch.tensor([[0.2, 0.1, 0.6]]),
        ...     torch.tensor([[True, False, True]]),
        ... )
        >>> index.tolist(), [round(weight, 1) for weight in weights[0].tolist()]
        ([[7, 5, 5]], [0.2, 0.0, 0.6])
    """
    is_dropped_TK = ~keep_TK
    best_slot_T1 = weights_TK.masked_fill(is_dropped_TK, float("-inf")).argmax(-1, keepdim=True)
    best_expert_T1 = top_k_index_TK.gather(-1, best_slot_T1)
    return AliasedSlots(
        torch.where(keep_TK, top_k_index_TK, best_expert_T1),
        weights_TK.masked_fill(is_dropped_TK, 0.0),
    )


def _sum(weights_TK: Tensor) -> Tensor:
    return weights_TK.sum(dim=-1, keepdim=True).clamp_min(_SMALLEST_SUM)


def _softmax_ratio(router_logits_TE: Tensor, top_k_index_TK: Tensor, temperature: float) -> Tensor:
    """Return softmax(logits / T) / softmax(logits) at the slots."""
    logits_TE = router_logits_TE.to(torch.float32)
    tempered_TE = (logits_TE / temperature).log_softmax(dim=-1)
    return (tempered_TE - logits_TE.log_softmax(dim=-1)).gather(-1, top_k_index_TK).exp()


def own_slots(router_logits_TE: Tensor, top_k_index_TK: Tensor, model_top_k: int) -> Tensor:
    """Return which candidates are the model's own top-k, bool (T, K); no host sync."""
    is_own_TK = torch.ones_like(top_k_index_TK, dtype=torch.bool)
    if model_top_k >= top_k_index_TK.shape[-1]:
        return is_own_TK
    logits_TK = router_logits_TE.gather(-1, top_k_index_TK)
    order_TK = logits_TK.argsort(dim=-1, descending=True, stable=True)
    return is_own_TK.scatter(-1, order_TK[..., model_top_k:], False)


def keep_best(
    candidates: Candidates, counts_T1: Tensor, strength_TK: Tensor | None = None
) -> Tensor:
    """Keep each token's `count` candidates with the largest logits; no host sync.

    Not every family sorts its slots, so slots are ranked by logit. Ties go to the slot that the
    router put first.

    Args:
        candidates: the slots of T tokens.
        counts_T1: number of slots to keep, integer, shape (T, 1) or (1, 1), values 1 to K.
        strength_TK: primary key of the ranking, with logits as the secondary; None: logits only.
    Returns:
        Bool tensor of shape (T, K).
    Example:
        >>> slots = Candidates(
        ...     router_logits_TE=torch.tensor([[0.1, 3.0, 2.0, 1.0]]),
        ...     top_k_index_TK=torch.tensor([[2, 3, 1]]),
        ...     top_k_weights_TK=torch.tensor([[0.2, 0.1, 0.7]]),
        ... )
        >>> keep_best(slots, torch.tensor([[2]])).tolist()
        [[True, False, True]]
    """
    logits_TK = candidates.router_logits_TE.gather(-1, candidates.top_k_index_TK)
    order_TK = logits_TK.argsort(dim=-1, descending=True, stable=True)
    if strength_TK is not None:
        by_strength_TK = strength_TK.gather(-1, order_TK)
        again_TK = by_strength_TK.argsort(dim=-1, descending=True, stable=True)
        order_TK = order_TK.gather(-1, again_TK)
    rank_K = torch.arange(order_TK.shape[-1], device=order_TK.device)
    is_kept_by_rank_TK = (rank_K < counts_T1).expand_as(order_TK)
    return torch.zeros_like(order_TK, dtype=torch.bool).scatter_(-1, order_TK, is_kept_by_rank_TK)


class SortedSlots(NamedTuple):
    """Slots by logit, largest first."""

    order_TK: Tensor
    """int64: the slot at each rank."""
    weights_TK: Tensor
    """float64, by rank."""


def sort_slots(candidates: Candidates) -> SortedSlots:
    """Sort each token's slots by logit, largest first; no host sync."""
    logits_TK = candidates.router_logits_TE.gather(-1, candidates.top_k_index_TK)
    order_TK = logits_TK.argsort(dim=-1, descending=True, stable=True)
    return SortedSlots(order_TK, candidates.top_k_weights_TK.double().gather(-1, order_TK))


def by_slot(order_TK: Tensor, keep_by_rank_TK: Tensor) -> Tensor:
    """Convert a mask by rank to a mask by slot."""
    return torch.zeros_like(keep_by_rank_TK).scatter_(-1, order_TK, keep_by_rank_TK)
