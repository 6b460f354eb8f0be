"""Decode step for one sequence on a GPU: four kernels per layer in addition to router and experts.

One token multiplies every matrix by a single vector, so a step is bound by reading the weights;
launches and waits are overhead. Two measures reduce it. Every program of a product recomputes the
norm and residual sum that it needs, which saves a kernel. Each kernel starts while the previous one
ends (programmatic dependent launch, Hopper and newer), and loads its weights before it waits for
the previous kernel's output.

Rounding follows the model, except that sums and attention probabilities are float32.

Axes: R rows of a matrix that one program multiplies, H hidden, D head dimension, C positions of the
cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from bh_routing.kernels.attention_triton import attend, let_next_start, wait_for_previous
from bh_routing.kernels.decode import DecodeState, Step
from bh_routing.kernels.decode_layout import Decoder, Layer, Norm
from bh_routing.kernels.experts import runs_on_hopper, sparse_experts_forward
from bh_routing.rules.router import RoutedSlots, Router

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls


# Measured on one H100: benchmarks/decode_settings.txt. Of 1 ms per step, 8 warps for attention cost
# 0.02 ms more, and parts of 32 or 128 positions 0.06 ms more.
POSITIONS_IN_A_PART: Final = 64
ATTEND_WARPS: Final = 4
BATCH_ATTEND_WARPS: Final = 2
MOST_PARTS: Final = 16
"""Parts of a sequence's cache that attention reads in parallel, in addition to the new token."""
MOST_PROGRAMS: Final = 1024
"""Programs up to which attention reads a sequence's cache in parts."""
ROWS: Final = {"attention": 4, "output": 8, "gate": 1, "head": 16}
"""Rows that one program multiplies."""


@triton.jit
def _project(
    stream, added, token, norm_weight, matrix, to_second, to_third, out, new_stream, normed_out,
    best, best_row, eps, FIRST_ROWS: tl.constexpr, SECOND_ROWS: tl.constexpr, ROWS: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, ADDS: tl.constexpr, LOOKS_UP: tl.constexpr,
    PICKS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Multiply up to three stacked matrices by the norm of `stream` + `added`.

    If LOOKS_UP, `stream` is the embedding matrix, and the token's row is the input.
    """
    let_next_start(OVERLAPS)
    first = tl.program_id(0) * R
    row_R = first + tl.arange(0, R)
    column_P = tl.arange(0, P)
    # An offset instead of a choice of pointers, for which the compiler would lose the alignment.
    shift = tl.where(first >= FIRST_ROWS + SECOND_ROWS, to_third, to_second)
    shift = tl.where(first >= FIRST_ROWS, shift, 0)
    inside_RP = (row_R < ROWS)[:, None] & (column_P < H)[None, :]
    place_RP = row_R.to(tl.int64)[:, None] * H + column_P[None, :] + shift
    block_RP = tl.load(matrix + place_RP, inside_RP, 0.0)
    weight_P = tl.load(norm_weight + column_P, column_P < H, 0.0)
    wait_for_previous(OVERLAPS)
    if LOOKS_UP:
        stream += tl.load(token) * H
    hidden_P = tl.load(stream + column_P, column_P < H, 0.0)
    if ADDS:
        hidden_P += tl.load(added + column_P, column_P < H, 0.0)
    hidden_32 = hidden_P.to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden_32 * hidden_32, 0) / H + eps)
    normed_P = (hidden_32 * scale).to(hidden_P.dtype) * weight_P
    if first == 0:
        if ADDS or LOOKS_UP:
            tl.store(new_stream + column_P, hidden_P, column_P < H)
        tl.store(normed_out + column_P, normed_P, column_P < H)
    sum_R = tl.sum(block_RP.to(tl.float32) * normed_P.to(tl.float32)[None, :], 1)
    result_R = sum_R.to(out.dtype.element_ty)
    tl.store(out + row_R, result_R, row_R < ROWS)
    if PICKS:
        value_R = tl.where(row_R < ROWS, result_R.to(tl.float32), -float("inf"))
        # Whether a maximum propagates NaN depends on the device; all propagate infinity.
        value_R = tl.where(value_R == value_R, value_R, float("inf"))
        largest = tl.max(value_R, 0)
        tl.store(best + tl.program_id(0), largest)
        is_best_R = (value_R == largest) & (row_R < ROWS)
        tl.store(best_row + tl.program_id(0), tl.min(tl.where(is_best_R, row_R, ROWS), 0))


@triton.jit
def _output(
    stream, heads, matrix, out, WIDTH: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    R: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Multiply the concatenated heads by the output matrix, and add the residual."""
    let_next_start(OVERLAPS)
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    column_P = tl.arange(0, P)
    inside_RP = (row_R < H)[:, None] & (column_P < WIDTH)[None, :]
    block_RP = tl.load(matrix + row_R[:, None] * WIDTH + column_P[None, :], inside_RP, 0.0)
    wait_for_previous(OVERLAPS)
    heads_P = tl.load(heads + column_P, column_P < WIDTH, 0.0).to(tl.float32)
    residual_R = tl.load(stream + row_R, row_R < H, 0.0)
    sum_R = tl.sum(block_RP.to(tl.float32) * heads_P[None, :], 1)
    tl.store(out + row_R, residual_R + sum_R.to(residual_R.dtype), row_R < H)


@triton.jit
def pick(
    best, best_row, token, written, top, position, is_live, is_end, BATCH: tl.constexpr,
    PROGRAMS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Select a sequence's token with the largest logit (ties: smallest id), increment position."""
    b = tl.program_id(0)
    at = tl.load(position + b)
    p = tl.arange(0, P)
    value_P = tl.load(best + b * PROGRAMS + p, p < PROGRAMS, -float("inf"))
    row_P = tl.load(best_row + b * PROGRAMS + p, p < PROGRAMS, 2147483647)
    largest = tl.max(value_P, 0)
    picked = tl.min(tl.where(value_P == largest, row_P, 2147483647), 0)
    tl.store(top + at * BATCH + b, largest)
    tl.store(token + b, picked.to(tl.int64))
    tl.store(written + at * BATCH + b, picked.to(tl.int64))
    goes_on = (tl.load(is_live + b) != 0) & (tl.load(is_end + picked) == 0)
    tl.store(is_live + b, goes_on)
    tl.debug_barrier()
    tl.store(position + b, at + 1)


IS_INTERPRETED: Final = not isinstance(_project, triton.JITFunction)


def serves(decoder: Decoder, batch: int) -> bool:
    """Whether `bind_few` supports this decoder and batch size."""
    dim = decoder.head_dim
    rows = [matrix.shape[0] for layer in decoder.layers for matrix in layer.attention[:3]]
    fits = dim & (dim - 1) == 0 and all(count % ROWS["attention"] == 0 for count in rows)
    return batch == 1 and fits and (IS_INTERPRETED or decoder.embedding_VH.is_cuda)


def bind_few(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Step:
    """Return a step for one sequence, as `bind_torch` does up to rounding; no host sync."""
    return _FewStep(decoder, state, routers)


class _FewStep:
    """The kernels of a step, with intermediate results at fixed addresses."""

    def __init__(self, decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> None:
        self._decoder, self._state, self._routers = decoder, state, routers
        self._recorder = Recorder(state)
        self._options: dict[str, Any] = {"OVERLAPS": runs_on_hopper() and not IS_INTERPRETED}
        if self._options["OVERLAPS"]:
            self._options["launch_pdl"] = True
        like, num_heads, dim = decoder.embedding_VH, decoder.num_heads, decoder.head_dim
        vocabulary, hidden = decoder.head_VH.shape
        self._stream = like.new_empty(hidden)
        self._residual = like.new_empty(hidden)
        self._normed = like.new_empty(1, hidden)
        self._row = like.new_empty(1, (num_heads + 2 * decoder.num_key_heads) * dim)
        self._heads = like.new_empty(1, num_heads * dim)
        self._attend = bind_attention(decoder, state, self._row, self._heads, self._options)
        num_best = triton.cdiv(vocabulary, ROWS["head"])
        self._best = like.new_empty(num_best, dtype=torch.float32)
        self._best_row = like.new_empty(num_best, dtype=torch.int32)

    def __call__(self) -> None:
        decoder, state = self._decoder, self._state
        slots: list[RoutedSlots] = []
        added = None
        for number, (layer, route) in enumerate(zip(decoder.layers, self._routers, strict=True)):
            self._project("attention", layer.input_norm, layer.attention[:3], self._row, added)
            self._attend(number)
            self._output(layer)
            logits_1E = self._row.new_empty(1, len(layer.gate_EH))
            self._project("gate", layer.experts_norm, [layer.gate_EH], logits_1E, None)
            slots.append(route(logits_1E))
            if layer is decoder.layers[-1]:
                self._recorder.start(slots)
            index_1K, weights_1K, _ = slots[-1]
            added = sparse_experts_forward(layer.experts, self._normed, index_1K, weights_1K)
        self._project("head", decoder.norm, [decoder.head_VH], state.logits_BV, added)
        self._recorder.join()
        num_best = len(self._best)
        pick[(1,)](
            self._best, self._best_row, state.token_B, state.token_PB, state.top_PB,
            state.position_B, state.is_live_B, state.is_end_V, BATCH=1, PROGRAMS=num_best,
            P=triton.next_power_of_2(num_best), num_warps=8,
        )  # fmt: skip

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

    def _output(self, layer: Layer) -> None:
        width, hidden = len(self._heads[0]), len(self._stream)
        _output[(triton.cdiv(hidden, ROWS["output"]),)](
            self._residual, self._heads, layer.attention.output, self._stream,
            WIDTH=width, H=hidden, P=triton.next_power_of_2(width), R=ROWS["output"], num_warps=4,
            **self._options,
        )  # fmt: skip


def bind_attention(
    decoder: Decoder, state: DecodeState, row_BX: Tensor, heads_BX: Tensor, options: dict[str, Any]
) -> Callable[[int], None]:
    """Return the attention of a layer, by its number: from queries, keys and values to heads.

    Args:
        decoder: the model.
        state: positions and cache; the new keys and values are written to it.
        row_BX: a sequence's concatenated queries, keys and values.
        heads_BX: where a sequence's heads are written.
        options: constants and options of every launch.
    """
    (batch, width), num_heads, dim = heads_BX.shape, decoder.num_heads, decoder.head_dim
    num_positions = state.keys.shape[3]
    most_parts = min(MOST_PARTS, max(1, MOST_PROGRAMS // (batch * num_heads)))
    part = max(POSITIONS_IN_A_PART, triton.cdiv(num_positions, most_parts))
    # The new token is a separate part.
    num_parts = 1 + triton.cdiv(num_positions, part)
    parts = heads_BX.new_empty((batch * num_heads, num_parts, dim), dtype=torch.float32)
    tops, sums = parts.new_empty(2, batch * num_heads, num_parts)
    arrived = parts.new_zeros(batch * num_heads, dtype=torch.int32)

    def attend_in(number: int) -> None:
        weights = decoder.layers[number].attention
        norm, key_norm = weights.query_norm, weights.key_norm
        attend[batch * num_heads, num_parts](
            row_BX, norm and norm.weight, key_norm and key_norm.weight,
            decoder.cos_PD, decoder.sin_PD, state.keys[number], state.values[number],
            state.position_B, parts, tops, sums, arrived, heads_BX,
            norm.eps if norm else 0.0, decoder.scaling,
            N=num_heads, G=decoder.num_key_heads, D=dim, C=num_positions, PART=part,
            BLOCK=min(64, part), PARTS=num_parts, S=triton.next_power_of_2(num_parts),
            P=triton.next_power_of_2(width),
            NORM="none" if norm is None else "head" if norm.weight.numel() == dim else "row",
            num_warps=ATTEND_WARPS if batch == 1 else BATCH_ATTEND_WARPS, **options,
        )  # fmt: skip

    return attend_in


class Recorder:
    """Records kept experts on a second stream, concurrently with the last layer's experts."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        self._stream = torch.cuda.Stream() if state.token_B.is_cuda else None

    def start(self, slots: Sequence[RoutedSlots]) -> None:
        if self._stream is None:
            self._state.record(slots)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._state.record(slots)

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
