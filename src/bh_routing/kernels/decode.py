"""One decode step in plain torch, and the choice of a faster implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bh_routing.kernels.decode_layout import Attention, Decoder, Layer, Norm
from bh_routing.kernels.experts import mix_one, mix_torch, read_experts, sparse_experts_forward
from bh_routing.rules.router import RoutedSlots, Router

Step = Callable[[], None]
"""Reads a state's tokens, and writes the next ones, the kept experts and the cache."""

DROPPED: Final = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeState:
    """Buffers of a decode step, at fixed addresses.

    Axes: P positions, B sequences, L layers, K slots, G key heads, D head dimension, V vocabulary.
    """

    token_B: Tensor
    """int64: the input tokens, after the step the output tokens."""
    position_B: Tensor
    """int64: positions of the input tokens; increased by 1 in a step."""
    row_B: Tensor
    """int64: numbers of the sequences."""
    token_PB: Tensor
    """int64: output tokens by the position of their input token."""
    kept_PLBK: Tensor
    """int16: kept expert of each slot, -1 where dropped."""
    keys: Tensor
    """(layers, B, G, P, D)."""
    values: Tensor
    logits_BV: Tensor
    top_PB: Tensor
    """float32: the largest logit per token; NaN or infinite if any logit is."""

    @classmethod
    def empty(
        cls, decoder: Decoder, *, batch: int, num_positions: int, num_slots: int
    ) -> DecodeState:
        """Allocate a state for sequences of any lengths up to `num_positions`."""
        like = decoder.embedding_VH
        shape = (len(decoder.layers), batch, decoder.num_key_heads, num_positions, decoder.head_dim)
        return cls(
            token_B=like.new_zeros(batch, dtype=torch.int64),
            position_B=like.new_zeros(batch, dtype=torch.int64),
            row_B=torch.arange(batch, device=like.device),
            token_PB=like.new_zeros(num_positions, batch, dtype=torch.int64),
            kept_PLBK=like.new_zeros(
                num_positions, len(decoder.layers), batch, num_slots, dtype=torch.int16
            ),
            keys=like.new_zeros(shape),
            values=like.new_zeros(shape),
            logits_BV=like.new_zeros(batch, decoder.head_VH.shape[0]),
            top_PB=like.new_zeros(num_positions, batch, dtype=torch.float32),
        )

    def record(self, slots: Sequence[RoutedSlots]) -> None:
        """Record the kept experts of all layers for the input tokens; no host sync."""
        index_BLK = torch.stack([layer.top_k_index_TK for layer in slots], 1)
        keep_BLK = torch.stack([layer.keep_TK for layer in slots], 1)
        kept_BLK = torch.where(keep_BLK, index_BLK, DROPPED).to(torch.int16)
        self.kept_PLBK.transpose(1, 2)[self.position_B, self.row_B] = kept_BLK


def bind_torch(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Step:
    """Return a step for a batch; on CUDA it makes no host sync and can be captured in a graph."""
    caches = list(zip(state.keys, state.values, strict=True))
    experts = [_bind_experts(layer, state.token_B.is_cuda) for layer in decoder.layers]
    parts = list(zip(decoder.layers, routers, experts, caches, strict=True))

    def step() -> None:
        hidden_BH = functional.embedding(state.token_B, decoder.embedding_VH)
        at = _everything(decoder, state) if hidden_BH.is_cuda else _written(decoder, state)
        slots: list[RoutedSlots] = []
        for layer, route, mix, cache in parts:
            normed_BH = _normalise(hidden_BH, layer.input_norm)
            hidden_BH = hidden_BH + _attend(layer.attention, decoder, normed_BH, at, cache)
            normed_BH = _normalise(hidden_BH, layer.experts_norm)
            slots.append(route(functional.linear(normed_BH, layer.gate_EH)))
            hidden_BH = hidden_BH + mix(normed_BH, slots[-1])
        logits_BV = functional.linear(_normalise(hidden_BH, decoder.norm), decoder.head_VH)
        state.logits_BV.copy_(logits_BV)
        state.token_B.copy_(logits_BV.argmax(-1))
        # argmax treats NaN as the largest, so the chosen logit reveals any NaN.
        top_B1 = logits_BV.gather(1, state.token_B.unsqueeze(1))
        state.top_PB[state.position_B, state.row_B] = top_B1[:, 0].float()
        state.record(slots)
        state.token_PB[state.position_B, state.row_B] = state.token_B
        state.position_B.add_(1)

    return step


class _At(NamedTuple):
    """Attention's inputs that depend on the step's positions."""

    cos_B1D: Tensor
    sin_B1D: Tensor
    place_2B: tuple[Tensor, Tensor]
    """Sequence and position of the new keys and values in the cache."""
    length: int
    """Positions of the cache that attention reads."""
    seen_B11P: Tensor | None
    """Mask of the positions attended to; None for all."""


def _written(decoder: Decoder, state: DecodeState) -> _At:
    positions = state.position_B.tolist()
    length = max(positions) + 1
    return _at(decoder, state, length, are_all_seen=min(positions) + 1 == length)


def _everything(decoder: Decoder, state: DecodeState) -> _At:
    # A graph's shapes are fixed: it reads the whole cache and masks the rest.
    return _at(decoder, state, state.keys.shape[3], are_all_seen=False)


def _at(decoder: Decoder, state: DecodeState, length: int, *, are_all_seen: bool) -> _At:
    place_B = state.position_B
    seen_BP = torch.arange(length, device=place_B.device) <= place_B[:, None]
    return _At(
        decoder.cos_PD[place_B].unsqueeze(1),
        decoder.sin_PD[place_B].unsqueeze(1),
        (state.row_B, place_B),
        length,
        None if are_all_seen else seen_BP[:, None, None],
    )


def _bind_experts(layer: Layer, is_cuda: bool) -> Callable[[Tensor, RoutedSlots], Tensor]:
    experts = read_experts(layer.experts)

    def mix(normed_BH: Tensor, slots: RoutedSlots) -> Tensor:
        index_BK, weights_BK, keep_BK = slots
        if is_cuda:
            return sparse_experts_forward(layer.experts, normed_BH, index_BK, weights_BK)
        if len(normed_BH) > 1:
            return mix_torch(experts, normed_BH, index_BK, weights_BK)
        expert_K, weights_K = index_BK[0], weights_BK[0]
        keep_K = keep_BK[0].numpy()
        count = int(np.count_nonzero(keep_K))
        if keep_K[:count].all():  # slicing is cheaper than gathering, and most rules allow it
            expert_K, weights_K = expert_K[:count], weights_K[:count]
        else:
            expert_K, weights_K = expert_K[keep_BK[0]], weights_K[keep_BK[0]]
        return mix_one(experts, normed_BH, expert_K, weights_K)

    return mix


def _attend(
    attention: Attention,
    decoder: Decoder,
    normed_BH: Tensor,
    at: _At,
    cache: tuple[Tensor, Tensor],
) -> Tensor:
    dim, num_heads = decoder.head_dim, decoder.num_heads
    heads = _rotate(_queries_and_keys(attention, normed_BH, dim), at)
    query_BND, key_BGD = heads[:, :num_heads], heads[:, num_heads:]
    value_BGD = functional.linear(normed_BH, attention.value).view(key_BGD.shape)
    for part, new_BGD in zip(cache, (key_BGD, value_BGD), strict=True):
        part.transpose(1, 2)[at.place_2B] = new_BGD
    keys, values = (part[:, :, : at.length] for part in cache)
    mixed = functional.scaled_dot_product_attention(
        query_BND.unsqueeze(2),
        keys,
        values,
        attn_mask=at.seen_B11P,
        scale=decoder.scaling,
        enable_gqa=num_heads != decoder.num_key_heads,
    )
    outputs: Tensor = functional.linear(mixed.flatten(1), attention.output)
    return outputs


def _normalise(hidden: Tensor, norm: Norm) -> Tensor:
    """Normalise as the models do: rounded to their dtype before the weight is applied."""
    normed: Tensor = functional.rms_norm(hidden.float(), hidden.shape[-1:], None, norm.eps)
    return norm.weight * normed.to(hidden.dtype)


def _queries_and_keys(attention: Attention, normed_BH: Tensor, dim: int) -> Tensor:
    """Return the heads of queries, then keys, each normalised as in the model."""
    query: Tensor = functional.linear(normed_BH, attention.query)
    key: Tensor = functional.linear(normed_BH, attention.key)
    query_norm, key_norm = attention.query_norm, attention.key_norm
    if query_norm is None or key_norm is None:
        return torch.cat([query, key], 1).view(len(query), -1, dim)
    if query_norm.weight.numel() == dim:
        query = _normalise(query.unflatten(1, (-1, dim)), query_norm)
        return torch.cat([query, _normalise(key.unflatten(1, (-1, dim)), key_norm)], 1)
    if query.shape == key.shape:
        # One norm of two rows: on a CPU, overhead per operation dominates.
        weights = torch.stack([query_norm.weight, key_norm.weight])
        rows = _normalise(torch.stack([query, key], 1), Norm(weights, query_norm.eps))
        return rows.view(len(query), -1, dim)
    rows = torch.cat([_normalise(query, query_norm), _normalise(key, key_norm)], 1)
    return rows.view(len(query), -1, dim)


def _rotate(heads: Tensor, at: _At) -> Tensor:
    return heads * at.cos_B1D + heads.roll(heads.shape[-1] // 2, -1) * at.sin_B1D


# Triton is optional, and these modules require it.
_FEW, _BATCH = (
    import_module(f"bh_routing.kernels.{name}") if find_spec("triton") else None
    for name in ("decode_triton", "decode_batch_triton")
)


def bind_step(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Step:
    """Return the fastest step: Triton kernels for up to 64 sequences on a GPU, or plain torch."""
    batch = len(state.token_B)
    if not decoder.embedding_VH.is_cuda or _FEW is None or _BATCH is None:
        return bind_torch(decoder, state, routers)
    if _FEW.serves(decoder, batch):
        step: Step = _FEW.bind_few(decoder, state, routers)
    elif _BATCH.serves(decoder, batch):
        step = _BATCH.bind_batch(decoder, state, routers)
    else:
        step = bind_torch(decoder, state, routers)
    return step
