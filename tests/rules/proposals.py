"""Slots as a router would propose them. Axes: T tokens, E experts, K slots."""

from __future__ import annotations

import torch
from torch import Tensor

from bh_routing.nulls import ReferenceTable, get_null
from bh_routing.rules import Candidates, LayerContext, Rule

NUM_EXPERTS = 64
MODEL_TOP_K = 8


def random_logits(num_tokens: int, num_experts: int = NUM_EXPERTS, seed: int = 0) -> Tensor:
    """Noise with a few signals a token, as many as the token's number modulo 12."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    rank_TE = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1).argsort(-1)
    is_signal_TE = rank_TE < (torch.arange(num_tokens) % 12).unsqueeze(-1)
    return logits_TE + 4 * is_signal_TE


def propose(
    logits_TE: Tensor, num_slots: int = MODEL_TOP_K, *, shuffled: bool = False, seed: int = 0
) -> Candidates:
    """Propose the best slots with raw softmax weights, in the order of logits or shuffled."""
    order_TE = logits_TE.float().argsort(dim=-1, descending=True, stable=True)
    index_TK = order_TE[:, :num_slots]
    if shuffled:
        generator = torch.Generator().manual_seed(seed)
        order_TK = torch.rand(index_TK.shape, generator=generator).argsort(dim=-1)
        index_TK = index_TK.gather(-1, order_TK)
    return Candidates(logits_TE, index_TK, logits_TE.float().softmax(-1).gather(-1, index_TK))


def context_for(
    rule: Rule, num_experts: int = NUM_EXPERTS, model_top_k: int = MODEL_TOP_K, device: str = "cpu"
) -> LayerContext:
    """A layer whose reference, if the rule needs one, comes from other random logits."""
    table = None
    if rule.required_null is not None:
        logits_TE = random_logits(2_000, num_experts, seed=99)
        top_k_index_TK = logits_TE.topk(model_top_k).indices
        table = ReferenceTable.from_scores(
            get_null(rule.required_null).reference(logits_TE, top_k_index_TK)
        )
    return LayerContext(
        layer=0,
        num_experts=num_experts,
        model_top_k=model_top_k,
        device=torch.device(device),
        table=table,
    )


def kept_experts(candidates: Candidates, keep_TK: Tensor) -> Tensor:
    """Bool (T, E): which experts a token keeps, whatever the order of its slots."""
    kept_TE = torch.zeros_like(candidates.router_logits_TE, dtype=torch.bool)
    return kept_TE.scatter(-1, candidates.top_k_index_TK, keep_TK)
