"""Expert modules and their implementations, with one for small batches on CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from bh_routing.errors import ModelError
from bh_routing.models.sites import RouterSite


def decoder_layer_of(model: nn.Module, site: RouterSite) -> nn.Module:
    """Return a router's decoder layer: the nearest enclosing module that is an item of a list.

    Its output is the residual stream.

    Raises:
        ModelError: no enclosing module is an item of a list.
    """
    parts = site.name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        if parts[length - 1].isdecimal():
            return model.get_submodule(".".join(parts[:length]))
    raise ModelError(
        f"router {site.name} is in no list of layers, so there is no residual stream to compare "
        "with; choose a null other than 'needed'"
    )


@torch.no_grad()
def slot_output_norms(
    experts: nn.Module, hidden_TH: Tensor, top_k_index_TK: Tensor, weights_dtype: torch.dtype
) -> Tensor:
    """Return the norm of each slot's expert output at weight 1, float32, shape (T, K).

    Every slot becomes a separate token with one expert, and the experts' `forward` runs without
    hooks. The cost is the arithmetic of one pass of the block and K copies of the hidden states.
    """
    num_tokens, num_slots = top_k_index_TK.shape
    one = torch.ones(num_tokens * num_slots, 1, dtype=weights_dtype, device=hidden_TH.device)
    outputs = experts.forward(
        hidden_TH.repeat_interleave(num_slots, dim=0), top_k_index_TK.reshape(-1, 1), one
    )
    norms: Tensor = outputs.float().norm(dim=-1)
    return norms.view(num_tokens, num_slots)


@contextmanager
def experts_by(model: Any, name: str, function: Callable[..., Any] | None = None) -> Iterator[None]:
    """Select the model's experts implementation inside a `with` block.

    Args:
        model: a transformers model.
        name: an implementation registered in transformers, or a name for `function`.
        function: registered under `name`; None if `name` is already registered.
    """
    if function is not None and name not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(name, function)
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


NAME: Final = "bh_cpu"
MOST_SLOTS: Final = 64
"""Above this, gathering a copy of the weights per slot costs more than a grouped product."""


def cpu_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Mix the experts of each token, as the model's own loop does up to rounding.

    Args:
        experts: the model's experts module, whose parameters `gate_up_proj` (E, 2F, H) and
            `down_proj` (E, H, F) hold all experts; other layouts are left to transformers.
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
    # Not every supported version of transformers has all of these attributes.
    return bool(
        getattr(experts, "has_gate", False)
        and not getattr(experts, "has_bias", False)
        and not getattr(experts, "is_transposed", False)
        and not getattr(experts, "has_post_expert_norm", False)
    )


def use_cpu_experts(model: Any, experts: Iterable[Any]) -> None:
    """Select `cpu_experts_forward` for a model on a CPU if it supports all its experts' layouts."""
    if all(_is_plain(module) for module in experts):
        ALL_EXPERTS_FUNCTIONS.register(NAME, cpu_experts_forward)
        model.set_experts_implementation(NAME)
