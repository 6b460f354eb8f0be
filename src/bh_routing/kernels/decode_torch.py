"""One step of decoding in plain torch: what the kernels are tested against, and what a CPU runs.

Axes: B texts written side by side, V vocabulary, H hidden, N heads, G key heads, D head dimension,
P positions, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from bh_routing.kernels.decode_layout import Attention, Decoder, Norm
from bh_routing.kernels.experts import sparse_experts_forward
from bh_routing.kernels.router_twin import RoutedSlots, Router

Step = Callable[[], None]
"""Reads a state's tokens and writes the next ones, what was kept for them, and the cache."""

DROPPED: Final = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeState:
    """What a step reads and writes, always in the same memory."""

    token_B: Tensor
    """int64: the tokens that go in, then those that come out."""
    position_1: Tensor
    """int64: where the tokens that go in stand; one more after the step."""
    token_PB: Tensor
    """int64: for each position, what came out where it went in."""
    kept_PLBK: Tensor
    """int16: kept expert of each slot, -1 where dropped."""
    keys: Tensor
    """(layers, B, G, P, D)."""
    values: Tensor
    logits_BV: Tensor

    @classmethod
    def empty(
        cls, decoder: Decoder, *, batch: int, num_positions: int, num_slots: int
    ) -> DecodeState:
        """Make room for texts of equal lengths."""
        like = decoder.embedding_VH
        shape = (len(decoder.layers), batch, decoder.num_key_heads, num_positions, decoder.head_dim)
        return cls(
            token_B=like.new_zeros(batch, dtype=torch.int64),
            position_1=like.new_zeros(1, dtype=torch.int64),
            token_PB=like.new_zeros(num_positions, batch, dtype=torch.int64),
            kept_PLBK=like.new_zeros(
                num_positions, len(decoder.layers), batch, num_slots, dtype=torch.int16
            ),
            keys=like.new_zeros(shape),
            values=like.new_zeros(shape),
            logits_BV=like.new_zeros(batch, decoder.head_VH.shape[0]),
        )

    def finish(self, slots: Sequence[RoutedSlots]) -> None:
        """Note what came out and what was kept, and go on to the next place; no host sync."""
        index_LBK = torch.stack([layer.top_k_index_TK for layer in slots])
        keep_LBK = torch.stack([layer.keep_TK for layer in slots])
        kept_LBK = torch.where(keep_LBK, index_LBK, DROPPED).to(torch.int16)
        self.kept_PLBK.index_copy_(0, self.position_1, kept_LBK.unsqueeze(0))
        self.token_PB.index_copy_(0, self.position_1, self.token_B.unsqueeze(0))
        self.position_1.add_(1)


def bind_torch(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Step:
    """Return the step of a batch; on CUDA it waits for nothing and may be captured in a graph."""
    num_positions = state.keys.shape[3]
    positions_P = torch.arange(num_positions, device=state.position_1.device)

    def step() -> None:
        hidden_BH = functional.embedding(state.token_B, decoder.embedding_VH)
        angles = decoder.cos_PD[state.position_1], decoder.sin_PD[state.position_1]
        seen = None
        if hidden_BH.is_cuda:
            seen = (positions_P <= state.position_1).view(1, 1, 1, num_positions)
        slots: list[RoutedSlots] = []
        for number, (layer, route) in enumerate(zip(decoder.layers, routers, strict=True)):
            normed_BH = _normalise(hidden_BH, layer.input_norm)
            cache = state.keys[number], state.values[number]
            hidden_BH = hidden_BH + _attend(
                layer.attention, decoder, normed_BH, angles, cache, state.position_1, seen
            )
            normed_BH = _normalise(hidden_BH, layer.experts_norm)
            slots.append(route(functional.linear(normed_BH, layer.gate_EH)))
            index_BK, weights_BK, _, _ = slots[-1]
            hidden_BH = hidden_BH + sparse_experts_forward(
                layer.experts, normed_BH, index_BK, weights_BK
            )
        logits_BV = functional.linear(_normalise(hidden_BH, decoder.norm), decoder.head_VH)
        state.logits_BV.copy_(logits_BV)
        state.token_B.copy_(logits_BV.argmax(-1))
        state.finish(slots)

    return step


def _attend(
    attention: Attention,
    decoder: Decoder,
    normed_BH: Tensor,
    angles: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    position_1: Tensor,
    seen: Tensor | None,
) -> Tensor:
    dim = decoder.head_dim
    query = functional.linear(normed_BH, attention.query)
    key = functional.linear(normed_BH, attention.key)
    value = functional.linear(normed_BH, attention.value)
    query_BND = _rotate(_heads(query, attention.query_norm, dim), angles)
    key_BGD = _rotate(_heads(key, attention.key_norm, dim), angles)
    value_BGD = value.view(key_BGD.shape)
    keys, values = cache
    if seen is None:
        length = int(position_1) + 1
        keys, values = keys[:, :, :length], values[:, :, :length]
        keys[:, :, -1], values[:, :, -1] = key_BGD, value_BGD
    else:
        keys.index_copy_(2, position_1, key_BGD.unsqueeze(2))
        values.index_copy_(2, position_1, value_BGD.unsqueeze(2))
    mixed = functional.scaled_dot_product_attention(
        query_BND.unsqueeze(2),
        keys,
        values,
        attn_mask=seen,
        scale=decoder.scaling,
        enable_gqa=decoder.num_heads != decoder.num_key_heads,
    )
    outputs: Tensor = functional.linear(mixed.flatten(1), attention.output)
    return outputs


def _normalise(hidden: Tensor, norm: Norm) -> Tensor:
    """As the families do: rounded to the model's dtype before the weight, not after."""
    if hidden.dtype == torch.float32:
        return functional.rms_norm(hidden, norm.weight.shape, norm.weight, norm.eps)
    normed = functional.rms_norm(hidden.float(), norm.weight.shape, None, norm.eps)
    return norm.weight * normed.to(hidden.dtype)


def _heads(rows: Tensor, norm: Norm | None, dim: int) -> Tensor:
    heads_shape = (len(rows), -1, dim)
    if norm is None:
        return rows.view(heads_shape)
    if norm.weight.numel() == dim:
        return _normalise(rows.view(heads_shape), norm)
    return _normalise(rows, norm).view(heads_shape)


def _rotate(heads: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos_1D, sin_1D = angles
    return heads * cos_1D + heads.roll(heads.shape[-1] // 2, -1) * sin_1D
