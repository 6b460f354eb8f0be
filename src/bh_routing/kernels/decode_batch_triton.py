"""Decode step for 2 to 64 sequences on a GPU: eight kernels per layer.

A product multiplies the rows of a matrix by all tokens, so each weight is read once. The experts'
kernels have one program per expert and block of rows, which finds the expert's slots itself, so no
kernel sorts them; outputs are stored per slot and summed in the order of the slots, so results are
deterministic. Up to FEW_TOKENS tokens, latency dominates: programs hold whole rows in registers,
read before the previous kernel has ended, and each slot reads its expert separately.

Rounding follows the model, except that sums and attention probabilities are float32.

Axes: B sequences, T a tile of tokens or slots, R rows of a matrix that one program multiplies,
H hidden, E experts, K slots per token, M slots of all tokens padded to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bh_routing.kernels.attention_triton import let_next_start, wait_for_previous
from bh_routing.kernels.decode import DecodeState, Step
from bh_routing.kernels.decode_layout import Decoder, Layer, Norm
from bh_routing.kernels.decode_triton import IS_INTERPRETED, Recorder, bind_attention, pick
from bh_routing.kernels.experts import ExpertWeights, read_experts, runs_on_hopper
from bh_routing.kernels.experts_triton import mix_few
from bh_routing.rules.router import RoutedSlots, Router

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

MOST_TOKENS: Final = 64


class Block(NamedTuple):
    """Rows that one program multiplies, columns per iteration, warps, and pipeline stages."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


# Measured on one H200 with OLMoE-1B-7B's shape.
BLOCKS: Final = {
    "attention": Block(32, 128, 4, 4),
    "output": Block(32, 128, 4, 6),
    "head": Block(32, 128, 4, 4),
    "up": Block(64, 128, 4, 3),
    "down": Block(128, 128, 4, 3),
}
FEW_TOKENS: Final = 4
"""4 tokens take 1.86 ms, by the other kernels 2.03 ms; 8 tokens 3.10 and 2.79 ms."""
FEW_ROWS: Final = {"attention": 4, "output": 4, "head": 8}
"""Rows that one program multiplies by few tokens."""


@triton.jit
def _multiply(
    inputs, matrix, to_second, to_third, residual, out, best, best_row,
    B: tl.constexpr, FIRST_ROWS: tl.constexpr, SECOND_ROWS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, T: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    DOTS: tl.constexpr, ADDS: tl.constexpr, PICKS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Multiply all tokens by R rows of up to three stacked matrices.

    If DOTS, tiles are multiplied by matrix units, and otherwise whole rows, read before waiting. If
    ADDS, the residual is added. If PICKS, each token's largest result and its row are stored.
    """
    let_next_start(OVERLAPS)
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    safe_row_R = tl.minimum(row_R, ROWS - 1)
    # An offset instead of a choice of pointers, for which the compiler would lose the alignment.
    shift_R = tl.where(row_R >= FIRST_ROWS + SECOND_ROWS, to_third, to_second)
    shift_R = tl.where(row_R >= FIRST_ROWS, shift_R, 0)
    start_R = matrix + safe_row_R.to(tl.int64) * WIDTH + shift_R
    column = tl.arange(0, COLUMNS)
    if not DOTS:
        block_RC = tl.load(start_R[:, None] + column[None, :], (column < WIDTH)[None, :], 0.0)
    wait_for_previous(OVERLAPS)
    # Surplus rows of a tile are copies of the last token, and not stored.
    t_T = tl.arange(0, T)
    x_T = inputs + tl.minimum(t_T, B - 1) * WIDTH
    if DOTS:
        sums_TR = tl.zeros([T, R], tl.float32)
        for left in range(0, WIDTH, COLUMNS):
            c = left + column
            if WIDTH % COLUMNS == 0:
                x_TC = tl.load(x_T[:, None] + c[None, :])
                weight_CR = tl.load(start_R[None, :] + c[:, None])
            else:
                x_TC = tl.load(x_T[:, None] + c[None, :], (c < WIDTH)[None, :], 0.0)
                weight_CR = tl.load(start_R[None, :] + c[:, None], (c < WIDTH)[:, None], 0.0)
            sums_TR = tl.dot(x_TC, weight_CR, sums_TR, input_precision="tf32x3")
    else:
        x_TC = tl.load(x_T[:, None] + column[None, :], (column < WIDTH)[None, :], 0.0)
        sums_TR = tl.sum(x_TC.to(tl.float32)[:, None, :] * block_RC.to(tl.float32)[None, :, :], 2)
    inside_TR = (t_T < B)[:, None] & (row_R < ROWS)[None, :]
    place_TR = t_T[:, None] * ROWS + row_R[None, :]
    result_TR = sums_TR.to(out.dtype.element_ty)
    if ADDS:
        result_TR += tl.load(residual + place_TR, inside_TR, 0.0)
    tl.store(out + place_TR, result_TR, inside_TR)
    if PICKS:
        value_TR = tl.where((row_R < ROWS)[None, :], result_TR.to(tl.float32), -float("inf"))
        # Whether a maximum propagates NaN depends on the device; all propagate infinity.
        value_TR = tl.where(value_TR == value_TR, value_TR, float("inf"))
        largest_T = tl.max(value_TR, 1)
        is_best_TR = (value_TR == largest_T[:, None]) & (row_R < ROWS)[None, :]
        picked_T = tl.min(tl.where(is_best_TR, row_R[None, :], ROWS), 1)
        place_T = t_T * tl.num_programs(0) + tl.program_id(0)
        tl.store(best + place_T, largest_T, t_T < B)
        tl.store(best_row + place_T, picked_T, t_T < B)


@triton.jit
def _normalise(hidden_P, weight_P, eps, H: tl.constexpr):
    """Normalise one token as the models do: rounded to their dtype before the weight is applied."""
    hidden_32 = hidden_P.to(tl.float32)
    scale = tl.rsqrt(tl.sum(hidden_32 * hidden_32, 0) / H + eps)
    return (hidden_32 * scale).to(hidden_P.dtype) * weight_P


@triton.jit
def _gate(
    stream, norm_weight, gate, logits, normed, eps,
    E: tl.constexpr, H: tl.constexpr, P: tl.constexpr, R: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Normalise one token, and multiply it by R rows of the router's matrix."""
    let_next_start(OVERLAPS)
    token = tl.program_id(0)
    row_R = tl.program_id(1) * R + tl.arange(0, R)
    column_P = tl.arange(0, P)
    inside_P = column_P < H
    place_RP = row_R[:, None] * H + column_P[None, :]
    block_RP = tl.load(gate + place_RP, (row_R < E)[:, None] & inside_P[None, :], 0.0)
    weight_P = tl.load(norm_weight + column_P, inside_P, 0.0)
    wait_for_previous(OVERLAPS)
    hidden_P = tl.load(stream + token * H + column_P, inside_P, 0.0)
    normed_P = _normalise(hidden_P, weight_P, eps, H)
    if tl.program_id(1) == 0:
        tl.store(normed + token * H + column_P, normed_P, inside_P)
    sum_R = tl.sum(block_RP.to(tl.float32) * normed_P.to(tl.float32)[None, :], 1)
    tl.store(logits + token * E + row_R, sum_R.to(logits.dtype.element_ty), row_R < E)


@triton.jit
def _rank_slots(index, weights, expert, SLOTS: tl.constexpr, M: tl.constexpr):
    """Number the kept slots of an expert from 0 (-1 for all others), and count them."""
    m = tl.arange(0, M)
    is_kept_M = tl.load(weights + m, m < SLOTS, 0.0) != 0
    is_mine_M = is_kept_M & (tl.load(index + m, m < SLOTS, -1) == expert)
    rank_M = tl.cumsum(is_mine_M.to(tl.int32), 0) - 1
    return tl.where(is_mine_M, rank_M, -1), tl.sum(is_mine_M.to(tl.int32), 0)


@triton.jit
def _slots_of(rank_M, rank_T, M: tl.constexpr):
    """Return the slots with these ranks, 0 beyond the last."""
    is_it_TM = rank_M[None, :] == rank_T[:, None]
    return tl.sum(tl.where(is_it_TM, tl.arange(0, M)[None, :], 0), 1)


@triton.jit
def _multiply_experts(
    inputs, matrix, index, weights, out, stride_expert,
    SLOTS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    IS_UP: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Multiply the tokens of one expert by R of its rows.

    Up reads a token's row for each slot and has a gate and a value matrix; down reads a slot's row.
    """
    expert = tl.program_id(1)
    if IS_UP:
        # In this order: the next kernel starts after all programs have waited, so it may read the
        # router's results before it waits.
        wait_for_previous(OVERLAPS)
        let_next_start(OVERLAPS)
    else:
        let_next_start(OVERLAPS)
    rank_M, count = _rank_slots(index, weights, expert, SLOTS, M)
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    start = matrix + expert.to(tl.int64) * stride_expert
    start_R = start + tl.minimum(row_R, ROWS - 1) * WIDTH
    if not IS_UP:
        wait_for_previous(OVERLAPS)
    # A token's kept slots are of different experts, so an expert has at most one per token.
    for begin in range(0, SLOTS // K, T):
        if begin < count:
            rank_T = begin + tl.arange(0, T)
            slot_T = _slots_of(rank_M, rank_T, M)
            x_T = inputs + (slot_T // K if IS_UP else slot_T) * WIDTH
            sums_TR = tl.zeros([T, R], tl.float32)
            values_TR = tl.zeros([T, R], tl.float32)
            for left in range(0, WIDTH, COLUMNS):
                column = left + tl.arange(0, COLUMNS)
                if WIDTH % COLUMNS == 0:
                    x_TC = tl.load(x_T[:, None] + column[None, :])
                    weight_CR = tl.load(start_R[None, :] + column[:, None])
                else:
                    inside = column < WIDTH
                    x_TC = tl.load(x_T[:, None] + column[None, :], inside[None, :], 0.0)
                    weight_CR = tl.load(start_R[None, :] + column[:, None], inside[:, None], 0.0)
                sums_TR = tl.dot(x_TC, weight_CR, sums_TR, input_precision="tf32x3")
                if IS_UP:
                    place_CR = start_R[None, :] + (ROWS * WIDTH + column)[:, None]
                    if WIDTH % COLUMNS == 0:
                        weight_CR = tl.load(place_CR)
                    else:
                        weight_CR = tl.load(place_CR, (column < WIDTH)[:, None], 0.0)
                    values_TR = tl.dot(x_TC, weight_CR, values_TR, input_precision="tf32x3")
            if IS_UP:
                sums_TR = sums_TR * tl.sigmoid(sums_TR) * values_TR
            place_TR = slot_T.to(tl.int64)[:, None] * ROWS + row_R[None, :]
            inside_TR = (rank_T < count)[:, None] & (row_R < ROWS)[None, :]
            tl.store(out + place_TR, sums_TR.to(out.dtype.element_ty), inside_TR)


@triton.jit
def _combine(
    outputs, weights, token, stream, norm_weight, normed, eps,
    K: tl.constexpr, S: tl.constexpr, H: tl.constexpr, P: tl.constexpr,
    LOOKS_UP: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Add a token's weighted expert outputs to its residual stream, and normalise it.

    If LOOKS_UP, `outputs` is the embedding matrix, and the token's row is the stream.
    """
    let_next_start(OVERLAPS)
    b = tl.program_id(0)
    column_P, slot_S = tl.arange(0, P), tl.arange(0, S)
    inside_P = column_P < H
    weight_P = tl.load(norm_weight + column_P, inside_P, 0.0)
    wait_for_previous(OVERLAPS)
    if LOOKS_UP:
        hidden_P = tl.load(outputs + tl.load(token + b) * H + column_P, inside_P, 0.0)
    else:
        share_S = tl.load(weights + b * K + slot_S, slot_S < K, 0.0).to(tl.float32)
        # Rows of dropped slots are uninitialised: the mask excludes NaN.
        inside_SP = (share_S != 0)[:, None] & inside_P[None, :]
        place_SP = (b * K + slot_S)[:, None] * H + column_P[None, :]
        output_SP = tl.load(outputs + place_SP, inside_SP, 0.0).to(tl.float32)
        mixed_P = tl.sum(output_SP * share_S[:, None], 0)
        hidden_P = tl.load(stream + b * H + column_P, inside_P, 0.0)
        hidden_P += mixed_P.to(hidden_P.dtype)
    tl.store(stream + b * H + column_P, hidden_P, inside_P)
    tl.store(normed + b * H + column_P, _normalise(hidden_P, weight_P, eps, H), inside_P)


def serves(decoder: Decoder, batch: int) -> bool:
    """Whether `bind_batch` supports this decoder and batch size."""
    dim, layer = decoder.head_dim, decoder.layers[0]
    experts = read_experts(layer.experts)
    is_plain = experts.is_silu_gated and experts.normalize is None
    is_dense = experts.up.stride(2) == 1 and experts.down.stride(2) == 1
    fits = dim & (dim - 1) == 0 and 2 <= batch <= MOST_TOKENS
    is_on_gpu = IS_INTERPRETED or decoder.embedding_VH.is_cuda
    return fits and is_plain and is_dense and is_on_gpu


def bind_batch(decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> Step:
    """Return a step for a batch, as `bind_torch` does up to rounding; no host sync."""
    return _BatchStep(decoder, state, routers)


class _BatchStep:
    """The kernels of a step, with intermediate results at fixed addresses."""

    def __init__(self, decoder: Decoder, state: DecodeState, routers: Sequence[Router]) -> None:
        self._decoder, self._state, self._routers = decoder, state, routers
        self._recorder = Recorder(state)
        self._experts = [read_experts(layer.experts) for layer in decoder.layers]
        overlaps = runs_on_hopper() and not IS_INTERPRETED
        self._options: dict[str, Any] = {"OVERLAPS": overlaps}
        if overlaps:
            self._options["launch_pdl"] = True
        like, dim = decoder.embedding_VH, decoder.head_dim
        self._batch, (vocabulary, hidden) = len(state.token_B), decoder.head_VH.shape
        batch, slots = self._batch, self._batch * state.kept_PLBK.shape[-1]
        self._stream, self._normed = like.new_empty(2, batch, hidden)
        self._row = like.new_empty(batch, (decoder.num_heads + 2 * decoder.num_key_heads) * dim)
        self._heads = like.new_empty(batch, decoder.num_heads * dim)
        self._attend = bind_attention(decoder, state, self._row, self._heads, self._options)
        self._inner = like.new_empty(slots, self._experts[0].down.shape[2])
        self._outputs = like.new_empty(slots, hidden)
        self._one_B1 = like.new_ones(batch, 1)
        self._is_few = batch <= FEW_TOKENS
        num_best = triton.cdiv(vocabulary, self._block("head", hidden).rows)
        self._best = like.new_empty(batch, num_best, dtype=torch.float32)
        self._best_row = like.new_empty(batch, num_best, dtype=torch.int32)

    def __call__(self) -> None:
        decoder, state = self._decoder, self._state
        slots: list[RoutedSlots] = []
        self._combine(decoder.layers[0].input_norm, decoder.embedding_VH, None)
        norms = [*(layer.input_norm for layer in decoder.layers[1:]), decoder.norm]
        for number, (layer, route) in enumerate(zip(decoder.layers, self._routers, strict=True)):
            self._multiply("attention", self._normed, layer.attention[:3], self._row)
            self._attend(number)
            self._multiply("output", self._heads, [layer.attention.output], self._stream)
            slots.append(route(self._gate(layer), state.live_rows()))
            if layer is decoder.layers[-1]:
                self._recorder.start(slots)
            outputs, weights_TK = self._mix(self._experts[number], slots[-1])
            self._combine(norms[number], outputs, weights_TK)
        self._multiply("head", self._normed, [decoder.head_VH], state.logits_BV)
        self._recorder.join()
        num_best = self._best.shape[1]
        pick[(self._batch,)](
            self._best, self._best_row, state.token_B, state.token_PB, state.top_PB,
            state.position_B, state.is_live_B, state.is_end_V, BATCH=self._batch,
            PROGRAMS=num_best, P=triton.next_power_of_2(num_best), num_warps=8,
        )  # fmt: skip

    def _multiply(self, use: str, inputs: Tensor, matrices: Sequence[Tensor], out: Tensor) -> None:
        width = inputs.shape[1]
        block = self._block(use, width)
        counts = [len(matrix) for matrix in matrices] + [0, 0]
        shifts = [0, 0]
        for number, matrix in enumerate(matrices[1:]):
            distance = matrix.data_ptr() - matrices[0].data_ptr()
            shifts[number] = distance // matrix.element_size() - sum(counts[: number + 1]) * width
        _multiply[(triton.cdiv(sum(counts), block.rows),)](
            inputs, matrices[0], *shifts, self._stream, out, self._best, self._best_row,
            B=self._batch, FIRST_ROWS=counts[0], SECOND_ROWS=counts[1], ROWS=sum(counts),
            WIDTH=width, T=max(1 if self._is_few else 16, triton.next_power_of_2(self._batch)),
            R=block.rows, COLUMNS=block.columns, DOTS=not self._is_few,
            ADDS=use == "output", PICKS=use == "head",
            num_warps=block.num_warps, num_stages=block.num_stages, **self._options,
        )  # fmt: skip

    def _block(self, use: str, width: int) -> Block:
        padded = triton.next_power_of_2(width)
        if self._is_few and use in FEW_ROWS:
            return Block(FEW_ROWS[use], padded, 8 if use == "head" else 4, 1)
        block = BLOCKS[use]
        return block._replace(columns=max(16, min(block.columns, padded)))

    def _gate(self, layer: Layer) -> Tensor:
        (num_experts, hidden), norm = layer.gate_EH.shape, layer.experts_norm
        logits_BE = self._row.new_empty(self._batch, num_experts)
        rows = min(8, triton.next_power_of_2(self._batch) // 2)
        _gate[self._batch, triton.cdiv(num_experts, rows)](
            self._stream, norm.weight, layer.gate_EH, logits_BE, self._normed, norm.eps,
            E=num_experts, H=hidden, P=triton.next_power_of_2(hidden), R=rows, num_warps=4,
            **self._options,
        )  # fmt: skip
        return logits_BE

    def _multiply_experts(self, use: str, experts: ExpertWeights, slots: RoutedSlots) -> None:
        is_up = use == "up"
        matrix = experts.up if is_up else experts.down
        inputs, out = (self._normed, self._inner) if is_up else (self._inner, self._outputs)
        num_experts, num_rows, width = matrix.shape
        num_rows //= 2 if is_up else 1
        block = self._block(use, width)
        num_slots = slots.top_k_index_TK.numel()
        _multiply_experts[triton.cdiv(num_rows, block.rows), num_experts](
            inputs, matrix, slots.top_k_index_TK, slots.top_k_weights_TK, out, matrix.stride(0),
            SLOTS=num_slots, M=triton.next_power_of_2(num_slots), K=num_slots // self._batch,
            WIDTH=width, ROWS=num_rows, T=16, R=block.rows, COLUMNS=block.columns,
            IS_UP=is_up, num_warps=block.num_warps,
            num_stages=block.num_stages, **self._options,
        )  # fmt: skip

    def _mix(self, experts: ExpertWeights, slots: RoutedSlots) -> tuple[Tensor, Tensor]:
        """Return outputs of experts and their weights, which are to be summed per token."""
        index_TK, weights_TK = slots.top_k_index_TK, slots.top_k_weights_TK
        if self._is_few:
            return mix_few(experts, self._normed, index_TK, weights_TK), self._one_B1
        self._multiply_experts("up", experts, slots)
        self._multiply_experts("down", experts, slots)
        return self._outputs, weights_TK

    def _combine(self, norm: Norm, outputs: Tensor, weights_TK: Tensor | None) -> None:
        hidden = self._stream.shape[1]
        num_slots = 1 if weights_TK is None else weights_TK.shape[1]
        _combine[(self._batch,)](
            outputs, weights_TK, self._state.token_B, self._stream, norm.weight, self._normed,
            norm.eps, K=num_slots, S=triton.next_power_of_2(num_slots), H=hidden,
            P=triton.next_power_of_2(hidden), LOOKS_UP=weights_TK is None, num_warps=8,
            **self._options,
        )  # fmt: skip
