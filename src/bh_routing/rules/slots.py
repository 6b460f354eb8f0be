"""From "how many" to "which": keep a token's best candidate slots.

Axes: T tokens, K candidate slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bh_routing.rules.base import Candidates


def keep_best(
    candidates: Candidates, counts_T1: Tensor, strength_TK: Tensor | None = None
) -> Tensor:
    """Keep each token's `count` candidates with the largest logits; no host sync.

    Slots aren't sorted in every family, so ranks come from the logits the family ranks by. A tie
    goes to the slot that the router put first.

    Args:
        candidates: the slots of T tokens.
        counts_T1: how many to keep, integer, shape (T, 1) or (1, 1), values 1 to K.
        strength_TK: what ranks slots before their logits do; None if nothing does.
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
    """Slots from the best to the worst by logit."""

    order_TK: Tensor
    """int64: which slot stands at each rank."""
    weights_TK: Tensor
    """float64, in that order."""


def sort_slots(candidates: Candidates) -> SortedSlots:
    """Sort each token's slots by what the family ranks by, best first; no host sync."""
    logits_TK = candidates.router_logits_TE.gather(-1, candidates.top_k_index_TK)
    order_TK = logits_TK.argsort(dim=-1, descending=True, stable=True)
    return SortedSlots(order_TK, candidates.top_k_weights_TK.double().gather(-1, order_TK))


def by_slot(order_TK: Tensor, keep_by_rank_TK: Tensor) -> Tensor:
    """Bring a mask by rank back into the order of the slots."""
    return torch.zeros_like(keep_by_rank_TK).scatter_(-1, order_TK, keep_by_rank_TK)
