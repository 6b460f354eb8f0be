"""What has to move and to be multiplied for a token, attention and head included.

Axes: B texts, S steps, L layers, K slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bh_routing.kernels.decode_layout import Decoder
from bh_routing.models.trace import DROPPED


class StepCost(NamedTuple):
    """One step of decoding B texts."""

    mean_experts: float
    """Kept by a token in a layer."""
    distinct_experts: float
    """Read in a layer: an expert that two texts keep is read once."""
    bytes: float
    """Weights, each once, and the cache of keys and values."""
    flops_per_token: float


def step_cost(decoder: Decoder, kept_SLBK: Tensor, context: float) -> StepCost:
    """Count for the steps whose kept experts are given.

    Args:
        decoder: the model.
        kept_SLBK: kept expert of each slot, -1 where dropped.
        context: mean number of positions that a token attends to.
    """
    is_kept = kept_SLBK != DROPPED
    mean_experts = float(is_kept.sum(-1).float().mean())
    num_layers, batch = kept_SLBK.shape[1:3]
    sorted_SLX = kept_SLBK.flatten(2).sort(-1).values
    starts = (
        torch.diff(
            sorted_SLX,
            dim=-1,
            prepend=sorted_SLX.new_full((1,), DROPPED).expand(*sorted_SLX.shape[:2], 1),
        )
        != 0
    )
    distinct = float((starts & (sorted_SLX != DROPPED)).sum(-1).float().mean())
    layer = decoder.layers[0]
    expert = sum(p[0].numel() for p in layer.experts.parameters())
    dense = num_layers * (sum(w.numel() for w in layer.attention[:4]) + layer.gate_EH.numel())
    dense += decoder.head_VH.numel()
    width = decoder.head_dim * num_layers
    cached = context * 2 * decoder.num_key_heads * width
    size = decoder.head_VH.element_size()
    return StepCost(
        mean_experts=mean_experts,
        distinct_experts=distinct,
        bytes=size * (dense + num_layers * distinct * expert + batch * cached),
        flops_per_token=2 * (dense + num_layers * mean_experts * expert)
        + 4 * context * decoder.num_heads * width,
    )
