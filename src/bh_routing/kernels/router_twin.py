"""The router in plain torch: what the fused one must equal, and what runs where there is none.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bh_routing.rules.base import Candidates, LayerContext, Rows, Rule
from bh_routing.rules.weights import alias_dropped, kept_weights


class RoutedSlots(NamedTuple):
    """The slots of T tokens in one layer, decided and weighted, from the largest logit down."""

    top_k_index_TK: Tensor
    """int64; a dropped slot names the expert of the token's best kept one."""
    top_k_weights_TK: Tensor
    """The family's dtype; exactly 0 where dropped."""
    keep_TK: Tensor
    """bool."""
    expert_counts_T: Tensor
    """int32: slots kept."""


Router = Callable[[Tensor], RoutedSlots]
"""Router logits (T, E), as the family's linear layer gives them -> slots; no host sync."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxFamily:
    """What a family's router does: softmax in float32 over all experts, then the k largest."""

    normalises: bool
    """Whether the k are then divided by their sum."""
    weights_dtype: torch.dtype | None = None
    """What they are rounded to in the end; None for that of the logits."""

    def propose(self, router_logits_TE: Tensor, num_slots: int) -> Candidates:
        """Propose the slots with the largest logits, ties to the smaller expert number.

        `torch.topk` breaks ties in any order, so among equal logits another expert may come first.
        """
        logits_TE = router_logits_TE.float()
        order_TE = logits_TE.argsort(dim=-1, descending=True, stable=True)
        index_TK = order_TE[:, :num_slots]
        weights_TK = router_logits_TE.softmax(dim=-1, dtype=torch.float32).gather(-1, index_TK)
        if self.normalises:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        dtype = self.weights_dtype or router_logits_TE.dtype
        return Candidates(logits_TE, index_TK, weights_TK.to(dtype))


def twin_router(rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router:
    """Bind any rule that needs no outputs of experts to a layer; torch only, on any device.

    Each row of logits is a sequence of its own, as in a decode step.

    Raises:
        InputError: the rule doesn't fit the layer, or lacks a calibration.
    """
    select = rule.bind(context)
    num_slots = rule.num_candidates(context.model_top_k)

    def route(router_logits_TE: Tensor) -> RoutedSlots:
        candidates = family.propose(router_logits_TE, num_slots)
        if rule.unit != "token":
            rows = Rows.of_step(len(router_logits_TE), router_logits_TE.device)
            candidates = candidates._replace(rows=rows)
        keep_TK = select(candidates)
        weights_TK = kept_weights(
            candidates.top_k_weights_TK,
            keep_TK,
            convention=rule.weights,
            normalises=family.normalises,
            temperature=rule.temperature,
            router_logits_TE=candidates.router_logits_TE,
            top_k_index_TK=candidates.top_k_index_TK,
            model_top_k=context.model_top_k,
            temperature_weights=rule.temperature_weights,
        )
        index_TK, weights_TK = alias_dropped(candidates.top_k_index_TK, weights_TK, keep_TK)
        return RoutedSlots(index_TK, weights_TK, keep_TK, keep_TK.sum(-1, dtype=torch.int32))

    return route
