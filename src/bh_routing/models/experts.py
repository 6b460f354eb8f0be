"""The modules around a router: its experts, its decoder layer, and what one slot's expert gives.

Axes: T tokens, H hidden, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bh_routing.errors import ModelError
from bh_routing.models.sites import RouterSite


def decoder_layer_of(model: nn.Module, site: RouterSite) -> nn.Module:
    """Return the decoder layer of a router: the nearest module around it that is one of a list.

    Its output is the residual stream.

    Raises:
        ModelError: no module around the router is one of a list.
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

    Every slot becomes a token of its own with one expert, and the experts' own code runs past any
    hook: as much arithmetic as one pass of the block, and K copies of the hidden states.
    """
    num_tokens, num_slots = top_k_index_TK.shape
    one = torch.ones(num_tokens * num_slots, 1, dtype=weights_dtype, device=hidden_TH.device)
    outputs = experts.forward(
        hidden_TH.repeat_interleave(num_slots, dim=0), top_k_index_TK.reshape(-1, 1), one
    )
    norms: Tensor = outputs.float().norm(dim=-1)
    return norms.view(num_tokens, num_slots)
