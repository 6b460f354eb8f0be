"""Bytes and operations that a decode step or a prefill needs, from the experts that it kept.

Axes: B sequences, S decode steps, T tokens, L layers, K slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bh_routing.kernels.decode_layout import Decoder
from bh_routing.models.trace import DROPPED, count_distinct


class PassCost(NamedTuple):
    """Cost of one forward pass: a decode step of B sequences, or a prompt."""

    mean_experts: float
    """Experts per token and layer."""
    distinct_experts: float
    """Experts read per pass and layer: one that several tokens keep is read once."""
    bytes: float
    """Weights read, each once, and keys and values of the cache, read or written."""
    flops_per_token: float


def step_cost(decoder: Decoder, kept_SLBK: Tensor, context: float) -> PassCost:
    """Count the mean cost of decode steps from the experts that they kept.

    Args:
        decoder: the model.
        kept_SLBK: kept expert of each slot, -1 where dropped.
        context: mean number of positions attended to.
    """
    head = decoder.head_VH.numel()
    return _pass_cost(decoder, kept_SLBK, context, heads=head, cached=kept_SLBK.shape[2] * context)


def prefill_cost(decoder: Decoder, kept_TLK: Tensor) -> PassCost:
    """Count the cost of a prompt's forward pass, with logits of its last token only."""
    tokens = len(kept_TLK)
    heads = decoder.head_VH.numel() / tokens
    kept_SLBK = kept_TLK.transpose(0, 1).unsqueeze(0)
    return _pass_cost(decoder, kept_SLBK, tokens / 2, heads=heads, cached=tokens)


def _pass_cost(
    decoder: Decoder, kept_SLBK: Tensor, context: float, *, heads: float, cached: float
) -> PassCost:
    layer, num_layers = decoder.layers[0], len(decoder.layers)
    tokens = kept_SLBK.shape[2]
    step_T = torch.arange(len(kept_SLBK), device=kept_SLBK.device).repeat_interleave(tokens)
    kept_TLK = kept_SLBK.transpose(1, 2).flatten(0, 1)
    distinct = float(count_distinct(step_T, kept_TLK, len(layer.gate_EH)).float().mean())
    mean_experts = float((kept_TLK != DROPPED).sum(-1).float().mean())
    expert = sum(p[0].numel() for p in layer.experts.parameters())
    dense = num_layers * (sum(w.numel() for w in layer.attention[:4]) + layer.gate_EH.numel())
    width = decoder.head_dim * num_layers
    read = dense + decoder.head_VH.numel() + num_layers * distinct * expert
    return PassCost(
        mean_experts=mean_experts,
        distinct_experts=distinct,
        bytes=decoder.head_VH.element_size() * (read + cached * 2 * decoder.num_key_heads * width),
        flops_per_token=2 * (dense + heads + num_layers * mean_experts * expert)
        + 4 * context * decoder.num_heads * width,
    )
