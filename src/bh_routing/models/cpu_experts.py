"""Experts for a CPU: one token at a time without the cost of grouping.

transformers' default groups tokens by expert and then visits all 64 groups, filled or not: of the
12 ms that a token of the demo model takes, more than half. For a few tokens it is quicker to gather
the kept experts' weights; a slot of weight 0 isn't gathered, so a dropped expert costs nothing.

Axes: T tokens, K slots, S kept slots, H hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

NAME: Final = "bh_cpu"
MOST_SLOTS: Final = 64
"""Above, gathering a copy of the weights for each slot costs more than grouping."""


def cpu_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Mix the experts of each token: what the family's own loop computes, up to rounding.

    Args:
        experts: a module of the family whose parameters `gate_up_proj` (E, 2F, H) and `down_proj`
            (E, H, F) hold all experts; other layouts are left to transformers.
        hidden_states: (T, H).
        top_k_index: int64, (T, K).
        top_k_weights: (T, K); exactly 0 where a slot was dropped.
    Returns:
        (T, H), in the dtype of `hidden_states`.
    """
    if top_k_index.numel() > MOST_SLOTS or not _is_plain(experts):
        mixed: Tensor = grouped_mm_experts_forward(
            experts, hidden_states, top_k_index, top_k_weights
        )
        return mixed
    token_S, slot_S = top_k_weights.nonzero(as_tuple=True)
    expert_S = top_k_index[token_S, slot_S]
    inputs_S1H = hidden_states[token_S].unsqueeze(1)
    gate_up_SF = torch.bmm(
        inputs_S1H, experts.gate_up_proj.index_select(0, expert_S).transpose(1, 2)
    )
    inner_S1F = experts._apply_gate(gate_up_SF)
    down_SHF = experts.down_proj.index_select(0, expert_S)
    outputs_SH = torch.bmm(inner_S1F, down_SHF.transpose(1, 2)).squeeze(1)
    weighted_SH = outputs_SH * top_k_weights[token_S, slot_S].unsqueeze(-1)
    mixed_TH = torch.zeros_like(hidden_states).index_add_(
        0, token_S, weighted_SH.to(hidden_states.dtype)
    )
    return mixed_TH


def _is_plain(experts: Any) -> bool:
    # Not every version of transformers that we support knows every one of these.
    return bool(
        getattr(experts, "has_gate", False)
        and not getattr(experts, "has_bias", False)
        and not getattr(experts, "is_transposed", False)
        and not getattr(experts, "has_post_expert_norm", False)
    )


def use_cpu_experts(model: Any, experts: Iterable[Any]) -> None:
    """Let a model on a CPU run its experts this way, if all of them are laid out plainly."""
    if all(_is_plain(module) for module in experts):
        ALL_EXPERTS_FUNCTIONS.register(NAME, cpu_experts_forward)
        model.set_experts_implementation(NAME)
