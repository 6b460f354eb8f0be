"""Expert modules, and the selection of their implementation in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bh_routing.errors import ModelError
from bh_routing.kernels.experts import NAME, sparse_experts_forward
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
    index = top_k_index_TK.reshape(-1, 1)
    if not hasattr(experts, "has_gate"):
        # Not transformers' interface but a loop; LongCat-Flash's fails on a single slot.
        index, one = index.expand(-1, 2), functional.pad(one, (0, 1))
    outputs = experts.forward(hidden_TH.repeat_interleave(num_slots, dim=0), index, one)
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


def use_sparse_experts(model: Any, experts: Iterable[Any]) -> None:
    """Select our sparse experts for a model on a CPU if they are as fast as transformers' own.

    They are for gated experts without bias, in the usual layout; other layouts weren't measured.
    """
    if all(map(_is_plain, experts)):
        ALL_EXPERTS_FUNCTIONS.register(NAME, sparse_experts_forward)
        model.set_experts_implementation(NAME)


def _is_plain(experts: Any) -> bool:
    # Not every supported version of transformers has all of these attributes.
    return bool(
        getattr(experts, "has_gate", False)
        and not getattr(experts, "has_bias", False)
        and not getattr(experts, "is_transposed", False)
        and not getattr(experts, "has_post_expert_norm", False)
    )
