# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""One step of decoding one text on a GPU: four kernels a layer beside the router and the experts.

A token multiplies every matrix by one vector, so the time is that of reading the weights, and what
comes between is launches and waiting. Hence: a norm, a residual sum and the join of attention's
parts are done again by every program of the product that needs them, instead of by a kernel before
it; and each kernel starts while the one before it ends (programmatic dependent launch, from Hopper
on) and reads its weights before it waits for what that one wrote.

Rounding is the model's own, except that sums are float32 and attention's probabilities too.

Axes: R rows of a matrix that one program multiplies, H hidden, D head dimension, C positions of the
cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bh_routing.kernels.decode_layout import Decoder, Layer, Norm
from bh_routing.kernels.decode_torch import DecodeState, Step
from bh_routing.kernels.experts import sparse_experts_forward
from bh_routing.kernels.experts_layout import runs_on_hopper
from bh_routing.kernels.router_twin import RoutedSlots, Router

# Measured on one H100 with OLMoE-1B-7B's shape, a step after 128 to 278 tokens in 512 places: parts
# of 64 positions take 1.118 ms, of 128 1.157, of 256 1.206. With parts of 128, attention's rows by
# 4 or 16 take 1.180 and 1.162, output's by 4 1.159, the gate's by 2 1.160, the head's by 8 1.160.
POSITIONS_IN_A_PART: Final = 64
MOST_PARTS: Final = 16
"""Parts of a text that attention reads side by side; every program of `_join` joins them."""
ROWS: Final = {"attention": 8, "output": 8, "gate": 1, "head": 16}
"""Rows that one program multiplies."""


@triton.jit
def _begin(OVERLAPS: tl.constexpr):
    # The next kernel may start right away: it waits for this one before it reads what this writes.
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def _wait(OVERLAPS: tl.constexpr):
    if OVERLAPS:
        gdc_wait()


@triton.jit
def _project(
    stream, added, token, norm_weight, matrix, to_second, to_third, out, new_stream, normed_out,
    best, best_row, eps, FIRST_ROWS: tl.constexpr, SECOND_ROWS: tl.constexpr, ROWS: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, ADDS: tl.constexpr, LOOKS_UP: tl.constexpr,
    PICKS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Multiply up to three matrices, one below the other, by the norm of `stream` + `added`.

    Where it looks up, `stream` is the embedding and its row that of the token.
    """
    _begin(OVERLAPS)
    begin = tl.program_id(0) * R
    row_R = begin + tl.arange(0, R)
    column_P = tl.arange(0, P)
    # Added to a place, not chosen among pointers, of which the compiler forgets the alignment.
    shift = tl.where(begin >= FIRST_ROWS + SECOND_ROWS, to_third, to_second)
    shift = tl.where(begin >= FIRST_ROWS, shift, 0)
    inside_RP = (row_R < ROWS)[:, None] & (column_P < H)[None, :]
    place_RP = row_R.to(tl.int64)[:, None] * H + column_P[None, :] + shift
    block_RP = tl.load(matrix + place_RP, inside_RP, 0.0)
    weight_P = tl.load(norm_weight + column_P, column_P < H, 0.0)
    _wait(OVERLAPS)
    if LOOKS_UP:
        stream += tl.load(token) * H
    hidden_P = tl.load(stream + column_P, column_P < H, 0.0)
    if ADDS:
        hidden_P += tl.load(added + column_P, column_P < H, 0.0)
    hidden_32 = hidden_P.to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden_32 * hidden_32, 0) / H + eps)
    normed_P = (hidden_32 * scale).to(hidden_P.dtype) * weight_P
    if begin == 0:
        if ADDS or LOOKS_UP:
            tl.store(new_stream + column_P, hidden_P, column_P < H)
        tl.store(normed_out + column_P, normed_P, column_P < H)
    sum_R = tl.sum(block_RP.to(tl.float32) * normed_P.to(tl.float32)[None, :], 1)
    result_R = sum_R.to(out.dtype.element_ty)
    tl.store(out + row_R, result_R, row_R < ROWS)
    if PICKS:
        value_R = tl.where(row_R < ROWS, result_R.to(tl.float32), -float("inf"))
        largest = tl.max(value_R, 0)
        tl.store(best + tl.program_id(0), largest)
        is_best_R = (value_R == largest) & (row_R < ROWS)
        tl.store(best_row + tl.program_id(0), tl.min(tl.where(is_best_R, row_R, ROWS), 0))


@triton.jit
def _head(
    row, norm_weight, cos, sin, head, eps,
    WIDTH: tl.constexpr, P: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One head of a query or key row, normed over all heads or its own, and rotated."""
    d = tl.arange(0, D)
    # The other half of the head, whose product with sin is added; sin carries the sign.
    other = (d + D // 2) % D
    here = tl.load(row + head * D + d)
    there = tl.load(row + head * D + other)
    if NORM != "none":
        if NORM == "row":
            column = tl.arange(0, P)
            whole = tl.load(row + column, column < WIDTH, 0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(whole * whole, 0) / WIDTH + eps)
            offset = head * D
        else:
            own = here.to(tl.float32)
            scale = tl.rsqrt(tl.sum(own * own, 0) / D + eps)
            offset = 0
        weight = tl.load(norm_weight + offset + d)
        other_weight = tl.load(norm_weight + offset + other)
        here = (here.to(tl.float32) * scale).to(here.dtype) * weight
        there = (there.to(tl.float32) * scale).to(there.dtype) * other_weight
    return here * cos + there * sin


@triton.jit
def _attend(
    row, query_norm, key_norm, cos, sin, keys, values, position, parts, tops, sums,
    eps, scaling, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Attend by one head to one part of the cache; the first part also meets the new token.

    Scores are summed as Milakov & Gimelshein (2018) do: the largest so far is taken out.
    """
    _begin(OVERLAPS)
    _wait(OVERLAPS)
    head = tl.program_id(0)
    part = tl.program_id(1)
    group = head // (N // G)
    d = tl.arange(0, D)
    at = tl.load(position)
    cos_D = tl.load(cos + at * D + d)
    sin_D = tl.load(sin + at * D + d)
    query_D = _head(row, query_norm, cos_D, sin_D, head, eps, N * D, P, D, NORM).to(tl.float32)
    top = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    mixed_D = tl.zeros([D], tl.float32)
    cache = group * C * D
    if part == 0:
        key_D = _head(row + N * D, key_norm, cos_D, sin_D, group, eps, G * D, P, D, NORM)
        value_D = tl.load(row + (N + G) * D + group * D + d)
        if head % (N // G) == 0:
            tl.store(keys + cache + at * D + d, key_D)
            tl.store(values + cache + at * D + d, value_D)
        top = tl.sum(query_D * key_D.to(tl.float32), 0) * scaling
        total += 1.0
        mixed_D = value_D.to(tl.float32)
    end = tl.minimum((part + 1) * PART, at)
    for offset in range(0, PART, BLOCK):
        begin = part * PART + offset
        if begin < end:
            c = begin + tl.arange(0, BLOCK)
            is_seen = c < end
            place = cache + c[:, None] * D + d[None, :]
            key_CD = tl.load(keys + place, is_seen[:, None], 0.0).to(tl.float32)
            value_CD = tl.load(values + place, is_seen[:, None], 0.0).to(tl.float32)
            score_C = tl.sum(key_CD * query_D[None, :], 1) * scaling
            score_C = tl.where(is_seen, score_C, -float("inf"))
            new_top = tl.maximum(top, tl.max(score_C, 0))
            shrink = tl.exp(top - new_top)
            share_C = tl.exp(score_C - new_top)
            total = total * shrink + tl.sum(share_C, 0)
            mixed_D = mixed_D * shrink + tl.sum(share_C[:, None] * value_CD, 0)
            top = new_top
    slot = part * N + head
    tl.store(parts + slot * D + d, mixed_D)
    tl.store(tops + slot, top)
    tl.store(sums + slot, total)


@triton.jit
def _join(
    stream, parts, tops, sums, matrix, out, N: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    PARTS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Join attention's parts, multiply by the output matrix, and add the residual."""
    _begin(OVERLAPS)
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    column_P = tl.arange(0, P)
    inside_RP = (row_R < H)[:, None] & (column_P < N * D)[None, :]
    block_RP = tl.load(matrix + row_R[:, None] * (N * D) + column_P[None, :], inside_RP, 0.0)
    _wait(OVERLAPS)
    head_N = tl.arange(0, P // D)
    inside_N = head_N < N
    place_ND = head_N[:, None] * D + tl.arange(0, D)[None, :]
    top_N = tl.load(tops + head_N, inside_N, 0.0)
    for part in tl.static_range(1, PARTS):
        top_N = tl.maximum(top_N, tl.load(tops + part * N + head_N, inside_N, 0.0))
    total_N = tl.zeros([P // D], tl.float32)
    mixed_ND = tl.zeros([P // D, D], tl.float32)
    for part in tl.static_range(PARTS):
        share_N = tl.exp(tl.load(tops + part * N + head_N, inside_N, 0.0) - top_N)
        total_N += share_N * tl.load(sums + part * N + head_N, inside_N, 1.0)
        part_ND = tl.load(parts + part * N * D + place_ND, inside_N[:, None], 0.0)
        mixed_ND += share_N[:, None] * part_ND
    mixed_ND = (mixed_ND / total_N[:, None]).to(matrix.dtype.element_ty).to(tl.float32)
    sum_R = tl.sum(block_RP.to(tl.float32) * tl.reshape(mixed_ND, [P])[None, :], 1)
    residual_R = tl.load(stream + row_R, row_R < H, 0.0)
    tl.store(out + row_R, residual_R + sum_R.to(residual_R.dtype), row_R < H)


@triton.jit
def _pick(
    best, best_row, token, vocabulary, PROGRAMS: tl.constexpr, B: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Take the token with the largest logit, the smaller of equals."""
    _begin(OVERLAPS)
    _wait(OVERLAPS)
    b = tl.arange(0, B)
    value_B = tl.load(best + b, b < PROGRAMS, -float("inf"))
    row_B = tl.load(best_row + b, b < PROGRAMS, 2147483647)
    picked = tl.min(tl.where(value_B == tl.max(value_B, 0), row_B, 2147483647), 0)
    picked = tl.where(picked < vocabulary, picked, 0)  # where all is NaN, nothing is largest
    tl.store(token, picked.to(tl.int64))


IS_INTERPRETED: Final = not isinstance(_project, triton.JITFunction)


def serves(decoder: Decoder, batch: int) -> bool:
    """Whether `bind_few` can write these texts."""
    dim = decoder.head_dim
    rows = [matrix.shape[0] for layer in decoder.layers for matrix in layer.attention[:3]]
    fits = dim & (dim - 1) == 0 and all(count % ROWS["attention"] == 0 for count in rows)
    return batch == 1 and fits and (IS_INTERPRETED or decoder.embedding_VH.is_cuda)


def bind_few(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Step:
    """Return the step of one text: as `bind_torch`'s, up to rounding; waits for nothing."""
    return _FewStep(decoder, state, routers)


class _FewStep:
    """The kernels of a step in their order, with what they hand on always in the same memory."""

    def __init__(self, decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> None:
        self._decoder, self._state, self._routers = decoder, state, routers
        self._options: dict[str, Any] = {"OVERLAPS": runs_on_hopper() and not IS_INTERPRETED}
        if self._options["OVERLAPS"]:
            self._options["launch_pdl"] = True
        like, num_heads, dim = decoder.embedding_VH, decoder.num_heads, decoder.head_dim
        vocabulary, hidden = decoder.head_VH.shape
        self._num_positions = state.keys.shape[3]
        self._part = max(POSITIONS_IN_A_PART, triton.cdiv(self._num_positions, MOST_PARTS))
        self._num_parts = triton.cdiv(self._num_positions, self._part)
        self._stream = like.new_empty(hidden)
        self._residual = like.new_empty(hidden)
        self._normed = like.new_empty(1, hidden)
        self._row = like.new_empty((num_heads + 2 * decoder.num_key_heads) * dim)
        parts = (self._num_parts, num_heads)
        self._parts = like.new_empty((*parts, dim), dtype=torch.float32)
        self._tops = like.new_empty(parts, dtype=torch.float32)
        self._sums = like.new_empty(parts, dtype=torch.float32)
        num_best = triton.cdiv(vocabulary, ROWS["head"])
        self._best = like.new_empty(num_best, dtype=torch.float32)
        self._best_row = like.new_empty(num_best, dtype=torch.int32)

    def __call__(self) -> None:
        decoder, state = self._decoder, self._state
        slots: list[RoutedSlots] = []
        added = None
        for number, (layer, route) in enumerate(zip(decoder.layers, self._routers, strict=True)):
            self._project("attention", layer.input_norm, layer.attention[:3], self._row, added)
            self._attend(number, layer)
            logits_1E = self._row.new_empty(1, len(layer.gate_EH))
            self._project("gate", layer.experts_norm, [layer.gate_EH], logits_1E, None)
            slots.append(route(logits_1E))
            index_1K, weights_1K, _, _ = slots[-1]
            added = sparse_experts_forward(layer.experts, self._normed, index_1K, weights_1K)
        self._project("head", decoder.norm, [decoder.head_VH], state.logits_BV, added)
        num_best = len(self._best)
        _pick[(1,)](
            self._best, self._best_row, state.token_B, decoder.head_VH.shape[0],
            PROGRAMS=num_best, B=triton.next_power_of_2(num_best), num_warps=8, **self._options,
        )  # fmt: skip
        state.finish(slots)

    def _project(
        self, use: str, norm: Norm, matrices: Sequence[Tensor], out: Tensor, added: Tensor | None
    ) -> None:
        hidden = len(self._stream)
        counts = [len(matrix) for matrix in matrices] + [0, 0]
        shifts = [0, 0]
        for number, matrix in enumerate(matrices[1:]):
            distance = matrix.data_ptr() - matrices[0].data_ptr()
            shifts[number] = distance // matrix.element_size() - sum(counts[: number + 1]) * hidden
        looks_up = use == "attention" and added is None
        _project[(triton.cdiv(sum(counts), ROWS[use]),)](
            self._decoder.embedding_VH if looks_up else self._stream, added, self._state.token_B,
            norm.weight, matrices[0], *shifts, out, self._residual, self._normed,
            self._best, self._best_row, norm.eps, FIRST_ROWS=counts[0],
            SECOND_ROWS=counts[1], ROWS=sum(counts), H=hidden, P=triton.next_power_of_2(hidden),
            R=ROWS[use], ADDS=added is not None, LOOKS_UP=looks_up, PICKS=use == "head",
            num_warps=8 if use == "head" else 4, **self._options,
        )  # fmt: skip

    def _attend(self, number: int, layer: Layer) -> None:
        decoder, state, weights = self._decoder, self._state, layer.attention
        dim, num_heads, hidden = decoder.head_dim, decoder.num_heads, len(self._stream)
        norm, key_norm = weights.query_norm, weights.key_norm
        width = "none" if norm is None else "head" if norm.weight.numel() == dim else "row"
        _attend[num_heads, self._num_parts](
            self._row, norm and norm.weight, key_norm and key_norm.weight,
            decoder.cos_PD, decoder.sin_PD, state.keys[number], state.values[number],
            state.position_1, self._parts, self._tops, self._sums,
            norm.eps if norm else 0.0, decoder.scaling,
            N=num_heads, G=decoder.num_key_heads, D=dim, C=self._num_positions, PART=self._part,
            BLOCK=min(64, self._part), P=triton.next_power_of_2(num_heads * dim), NORM=width,
            num_warps=4, **self._options,
        )  # fmt: skip
        _join[(triton.cdiv(hidden, ROWS["output"]),)](
            self._residual, self._parts, self._tops, self._sums, weights.output, self._stream,
            N=num_heads, D=dim, H=hidden, PARTS=self._num_parts,
            P=triton.next_power_of_2(num_heads) * dim, R=ROWS["output"], num_warps=4,
            **self._options,
        )  # fmt: skip
