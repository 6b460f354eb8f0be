"""Prefill and decode step in plain torch, and the choice of faster implementations.

Axes: P positions, B sequences, T their tokens, L layers, K slots, N heads, G key heads, D head
dimension, H hidden, V vocabulary.
"""

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

Prefill = Callable[[Tensor, Tensor], None]
"""Reads prompts (B, P), padded at their ends, and their lengths (B,), 0 for none: sets a state to
their first generated tokens."""

DROPPED: Final = -1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DecodeState:
    """Buffers of prefill and decode steps, at fixed addresses."""

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
    is_live_B: Tensor
    """bool: sequences that haven't ended; others are decoded on, but neither vote nor count."""
    is_end_V: Tensor
    """bool: tokens that end a sequence."""

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
            is_live_B=like.new_ones(batch, dtype=torch.bool),
            is_end_V=like.new_zeros(decoder.head_VH.shape[0], dtype=torch.bool),
        )

    def live_rows(self) -> Tensor | None:
        """Return the mask of a step's routers, (B, 1); None for a single sequence."""
        return self.is_live_B[:, None] if len(self.is_live_B) > 1 else None

    def record(self, slots: Sequence[RoutedSlots]) -> None:
        """Record the kept experts of all layers for the input tokens; no host sync."""
        self.kept_PLBK.transpose(1, 2)[self.position_B, self.row_B] = _kept(slots)


def _kept(slots: Sequence[RoutedSlots]) -> Tensor:
    index_TLK = torch.stack([layer.top_k_index_TK for layer in slots], 1)
    keep_TLK = torch.stack([layer.keep_TK for layer in slots], 1)
    return torch.where(keep_TLK, index_TLK, DROPPED).to(torch.int16)


def bind_torch(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Step:
    """Return a step for a batch; on CUDA it makes no host sync and can be captured in a graph."""
    layers = _bind_layers(decoder, routers, [_bind_experts(layer) for layer in decoder.layers])

    def step() -> None:
        hidden_BH = functional.embedding(state.token_B, decoder.embedding_VH)
        at = _everything(decoder, state) if hidden_BH.is_cuda else _written(decoder, state)

        def attend(number: int, normed_BH: Tensor) -> Tensor:
            return _attend(decoder, state, number, normed_BH, at)

        normed_BH, slots = layers(hidden_BH, attend, _add_and_normalise, state.live_rows())
        state.record(slots)
        _finish(decoder, state, normed_BH)

    return step


def bind_prompts(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Prefill:
    """Return the prefill; on CUDA it makes no host sync and can be captured in a graph.

    Padding follows a sequence, so that causal attention never reaches it.
    """
    # On a CPU the model's own experts, whose sums are rounded as in `generate`.
    experts = [_bind_experts(x) if x.gate_EH.is_cuda else _own_experts(x) for x in decoder.layers]
    layers = _bind_layers(decoder, routers, experts)
    place, normalise = _place_heads, _add_and_normalise
    if _PREFILL is not None and _PREFILL.serves(decoder):
        place, normalise = _PREFILL.place_heads, _PREFILL.add_and_normalise

    def read(token_BP: Tensor, length_B: Tensor) -> None:
        batch, num_positions = token_BP.shape
        is_real_BP = torch.arange(num_positions, device=token_BP.device) < length_B[:, None]

        def attend(number: int, normed_TH: Tensor) -> Tensor:
            query_BNPD = place(decoder, state, number, normed_TH, is_real_BP)
            keys, values = (
                part[number, :, :, :num_positions] for part in (state.keys, state.values)
            )
            mixed = functional.scaled_dot_product_attention(
                query_BNPD,
                keys,
                values,
                is_causal=True,
                scale=decoder.scaling,
                enable_gqa=decoder.num_heads != decoder.num_key_heads,
            )
            heads_TX = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
            return functional.linear(heads_TX, decoder.layers[number].attention.output)

        hidden_TH = functional.embedding(token_BP.flatten(), decoder.embedding_VH)
        normed_TH, slots = layers(hidden_TH, attend, normalise, is_real_BP)
        kept_TLK = _kept(slots)
        state.kept_PLBK[:num_positions] = kept_TLK.unflatten(0, (batch, -1)).permute(1, 2, 0, 3)
        state.is_live_B.copy_(length_B > 0)
        state.position_B.copy_((length_B - 1).clamp_min(0))
        last_BH = normed_TH.unflatten(0, (batch, -1))[state.row_B, state.position_B]
        _finish(decoder, state, last_BH)

    return read


Normalise = Callable[[Tensor, "Tensor | None", Norm], "tuple[Tensor, Tensor]"]


Mix = Callable[[Tensor, RoutedSlots], Tensor]


def _bind_layers(
    decoder: Decoder, routers: Sequence[Router], experts: Sequence[Mix]
) -> Callable[..., tuple[Tensor, list[RoutedSlots]]]:
    """Return all layers as one function: embeddings -> last norm's output, and slots by layer."""
    parts = list(zip(decoder.layers, routers, experts, strict=True))

    def run(
        hidden_TH: Tensor,
        attend: Callable[[int, Tensor], Tensor],
        normalise: Normalise,
        is_real_BS: Tensor | None,
    ) -> tuple[Tensor, list[RoutedSlots]]:
        slots: list[RoutedSlots] = []
        added_TH = None
        for number, (layer, route, mix) in enumerate(parts):
            hidden_TH, normed_TH = normalise(hidden_TH, added_TH, layer.input_norm)
            added_TH = attend(number, normed_TH)
            hidden_TH, normed_TH = normalise(hidden_TH, added_TH, layer.experts_norm)
            slots.append(route(functional.linear(normed_TH, layer.gate_EH), is_real_BS))
            added_TH = mix(normed_TH, slots[-1])
        return normalise(hidden_TH, added_TH, decoder.norm)[1], slots

    return run


def _add_and_normalise(
    hidden_TH: Tensor, added_TH: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor]:
    if added_TH is not None:
        hidden_TH = hidden_TH + added_TH
    return hidden_TH, _normalise(hidden_TH, norm)


def _finish(decoder: Decoder, state: DecodeState, normed_BH: Tensor) -> None:
    """Choose the next tokens, and advance the positions."""
    logits_BV = functional.linear(normed_BH, decoder.head_VH)
    state.logits_BV.copy_(logits_BV)
    state.token_B.copy_(logits_BV.argmax(-1))
    # argmax treats NaN as the largest, so the chosen logit reveals any NaN.
    top_B1 = logits_BV.gather(1, state.token_B.unsqueeze(1))
    state.top_PB[state.position_B, state.row_B] = top_B1[:, 0].float()
    state.token_PB[state.position_B, state.row_B] = state.token_B
    state.is_live_B.logical_and_(~state.is_end_V[state.token_B])
    state.position_B.add_(1)


class _At(NamedTuple):
    """Attention's inputs that depend on the step's positions."""

    cos_B1D: Tensor
    sin_B1D: Tensor
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
        length,
        None if are_all_seen else seen_BP[:, None, None],
    )


def _own_experts(layer: Layer) -> Mix:
    return lambda normed_TH, slots: layer.experts(normed_TH, *slots[:2])


def _bind_experts(layer: Layer) -> Mix:
    experts = read_experts(layer.experts)
    if experts.up.is_cuda:
        return lambda normed_TH, slots: sparse_experts_forward(layer.experts, normed_TH, *slots[:2])

    def mix(normed_TH: Tensor, slots: RoutedSlots) -> Tensor:
        index_TK, weights_TK, keep_TK = slots
        if len(normed_TH) > 1:
            return mix_torch(experts, normed_TH, index_TK, weights_TK)
        expert_K, weights_K = index_TK[0], weights_TK[0]
        keep_K = keep_TK[0].numpy()
        count = int(np.count_nonzero(keep_K))
        if keep_K[:count].all():  # slicing is cheaper than gathering, and most rules allow it
            expert_K, weights_K = expert_K[:count], weights_K[:count]
        else:
            expert_K, weights_K = expert_K[keep_TK[0]], weights_K[keep_TK[0]]
        return mix_one(experts, normed_TH, expert_K, weights_K)

    return mix


def _attend(
    decoder: Decoder, state: DecodeState, number: int, normed_BH: Tensor, at: _At
) -> Tensor:
    attention, num_heads = decoder.layers[number].attention, decoder.num_heads
    heads = _queries_and_keys(attention, normed_BH, decoder.head_dim)
    heads = _rotate(heads, at.cos_B1D, at.sin_B1D)
    query_BND, key_BGD = heads[:, :num_heads], heads[:, num_heads:]
    value_BGD = functional.linear(normed_BH, attention.value).view(key_BGD.shape)
    cache = state.keys[number], state.values[number]
    for part, new_BGD in zip(cache, (key_BGD, value_BGD), strict=True):
        part.transpose(1, 2)[state.row_B, state.position_B] = new_BGD
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


def _place_heads(
    decoder: Decoder, state: DecodeState, number: int, normed_TH: Tensor, is_real_BP: Tensor
) -> Tensor:
    """Write keys and values of real tokens to the cache, and return the queries, (B, N, P, D)."""
    (batch, num_positions), num_heads = is_real_BP.shape, decoder.num_heads
    attention, dim = decoder.layers[number].attention, decoder.head_dim
    cos_P1D, sin_P1D = (t[:num_positions, None] for t in (decoder.cos_PD, decoder.sin_PD))
    heads = _queries_and_keys(attention, normed_TH, dim).unflatten(0, (batch, num_positions))
    heads = _rotate(heads, cos_P1D, sin_P1D)
    value_BPGD = functional.linear(normed_TH, attention.value).view(*is_real_BP.shape, -1, dim)
    for part, new in zip(
        (state.keys, state.values), (heads[:, :, num_heads:], value_BPGD), strict=True
    ):
        real = new.masked_fill(~is_real_BP[:, :, None, None], 0.0)
        part[number, :, :, :num_positions] = real.transpose(1, 2)
    return heads[:, :, :num_heads].transpose(1, 2)


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


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return heads * cos + heads.roll(heads.shape[-1] // 2, -1) * sin


# Triton is optional, and these modules require it.
_FEW, _BATCH, _PREFILL = (
    import_module(f"bh_routing.kernels.{name}") if find_spec("triton") else None
    for name in ("decode_triton", "decode_batch_triton", "prefill_triton")
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
