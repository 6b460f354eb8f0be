"""Triton kernels of the sparse experts: two kernels for few tokens, grouped products for many."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bh_routing.kernels.attention_triton import let_next_start, wait_for_previous
from bh_routing.kernels.experts import ExpertWeights, runs_on_hopper

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls


class Block(NamedTuple):
    """Rows of a matrix that one program reads, and its columns and slots per iteration."""

    rows: int
    columns: int
    slots: int
    num_warps: int


# Measured on one H100 with OLMoE-1B-7B's experts, for one and four tokens, 8 and 4 kept, and in a
# whole step: no other block was faster both at 8 and at 4.
UP: Final = Block(rows=4, columns=1024, slots=1, num_warps=4)
DOWN: Final = Block(rows=2, columns=1024, slots=4, num_warps=2)
# Here outputs are contiguous in memory. Not measured.
UP_TRANSPOSED: Final = Block(rows=32, columns=256, slots=1, num_warps=4)
DOWN_TRANSPOSED: Final = Block(rows=32, columns=128, slots=4, num_warps=4)


@triton.jit
def _multiply_up(
    hidden, index, weights, up, bias, out,
    stride_expert, stride_row, stride_column,
    E: tl.constexpr, K: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr,
    IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    OVERLAPS: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    # In this order: the next kernel starts after all programs have waited, so it may read the
    # results of earlier kernels.
    wait_for_previous(OVERLAPS)
    let_next_start(OVERLAPS)
    # Slots vary fastest: tokens that share an expert read its rows at about the same time.
    slot = tl.program_id(0)
    expert = tl.load(index + slot).to(tl.int64)
    if (tl.load(weights + slot) != 0) & (expert < E):
        row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        first = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        second = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        start = up + expert * stride_expert + row[:, None] * stride_row
        for begin in tl.static_range(0, H, BLOCK_H):
            column = begin + tl.arange(0, BLOCK_H)
            x = tl.load(hidden + slot // K * H + column, column < H, 0.0).to(tl.float32)
            inside = (row < ROWS)[:, None] & (column < H)[None, :]
            pointer = start + column[None, :] * stride_column
            first += (
                tl.load(pointer, inside, 0.0, eviction_policy=POLICY).to(tl.float32) * x[None, :]
            )
            if IS_GATED:
                other = tl.load(
                    pointer + ROWS * stride_row, inside, 0.0, eviction_policy=POLICY
                ).to(tl.float32)
                second += other * x[None, :]
        result = tl.sum(first, 1)
        if IS_GATED:
            result = result * tl.sigmoid(result) * tl.sum(second, 1)
        if HAS_BIAS:
            result += tl.load(bias + expert * ROWS + row, row < ROWS, 0.0).to(tl.float32)
        tl.store(out + slot * ROWS + row, result.to(out.dtype.element_ty), row < ROWS)


@triton.jit
def _multiply_down(
    inner, index, weights, down, bias, out,
    stride_expert, stride_row, stride_column,
    E: tl.constexpr, K: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, OVERLAPS: tl.constexpr,
    POLICY: tl.constexpr,
):  # fmt: skip
    let_next_start(OVERLAPS)
    token = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mixed = tl.zeros([BLOCK_N], tl.float32)
    for begin in tl.static_range(0, K, BLOCK_K):
        slot = begin + tl.arange(0, BLOCK_K)
        number = token * K + slot
        weight = tl.load(weights + number, slot < K, 0.0).to(tl.float32)
        expert = tl.load(index + number, slot < K, 0).to(tl.int64)
        kept = (weight != 0) & (expert < E)
        inside = kept[:, None] & (row < ROWS)[None, :]
        start = down + expert[:, None] * stride_expert + row[None, :] * stride_row
        products = tl.zeros([BLOCK_K, BLOCK_N, BLOCK_F], tl.float32)
        for left in tl.static_range(0, F, BLOCK_F):
            column = left + tl.arange(0, BLOCK_F)
            pointer = start[:, :, None] + column[None, None, :] * stride_column
            block = tl.load(
                pointer,
                inside[:, :, None] & (column < F)[None, None, :],
                0.0,
                eviction_policy=POLICY,
            )
            if begin + left == 0:
                wait_for_previous(OVERLAPS)
            # Inner rows of dropped slots are uninitialised: the mask excludes NaN.
            mask = kept[:, None] & (column < F)[None, :]
            x = tl.load(inner + number[:, None] * F + column[None, :], mask, 0.0).to(tl.float32)
            products += block.to(tl.float32) * x[:, None, :]
        output = tl.sum(products, 2)
        if HAS_BIAS:
            offset = expert[:, None] * ROWS + row[None, :]
            output += tl.load(bias + offset, inside, 0.0).to(tl.float32)
        mixed += tl.sum(output * weight[:, None], 0)
    tl.store(out + token * ROWS + row, mixed.to(out.dtype.element_ty), row < ROWS)


def mix_few(
    experts: ExpertWeights, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Mix the kept experts of each token, with one program per slot and block of rows.

    Args, returns: as in `mix_torch`; products and sums are float32, in a fixed order.
    """
    assert experts.normalize is None, "a norm needs each expert's whole output"
    hidden = hidden_TH.to(experts.up.dtype).contiguous()
    index, weights = index_TK.contiguous(), weights_TK.contiguous()
    (num_tokens, num_slots), (num_experts, num_rows, hidden_size) = index.shape, experts.up.shape
    is_gated = experts.is_silu_gated
    if is_gated:
        num_rows //= 2
    # No kernel may run between the two, and torch.compile launches kernels in its own way.
    overlaps = is_gated and runs_on_hopper() and not torch.compiler.is_compiling()
    # A single token reads each weight once: evict it first, to keep the cache for other data.
    policy = "evict_first" if num_tokens == 1 else ""
    inner = hidden.new_empty(num_tokens * num_slots, num_rows)
    block = UP if experts.up.stride(2) == 1 else UP_TRANSPOSED
    _multiply_up[num_tokens * num_slots, triton.cdiv(num_rows, block.rows)](
        hidden, index, weights, experts.up, experts.up_bias, inner,
        *experts.up.stride(), num_experts, num_slots, hidden_size, num_rows,
        is_gated, experts.up_bias is not None,
        block.rows, _at_most(block.columns, hidden_size), overlaps, policy,
        num_warps=block.num_warps, **_options(overlaps),
    )  # fmt: skip
    if not is_gated:
        inner = experts.activate(inner).contiguous()
    mixed = torch.empty_like(hidden_TH, memory_format=torch.contiguous_format)
    block = DOWN if experts.down.stride(2) == 1 else DOWN_TRANSPOSED
    _multiply_down[num_tokens, triton.cdiv(hidden_size, block.rows)](
        inner, index, weights, experts.down, experts.down_bias, mixed,
        *experts.down.stride(), num_experts, num_slots, inner.shape[1], hidden_size,
        experts.down_bias is not None, _at_most(block.slots, num_slots),
        block.rows, _at_most(block.columns, inner.shape[1]), overlaps, policy,
        num_warps=block.num_warps, **_options(overlaps),
    )  # fmt: skip
    return mixed


def _at_most(block: int, size: int) -> Any:
    return min(block, triton.next_power_of_2(size))


def _options(overlaps: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if overlaps else {}


# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls


PAIRS_AT_A_TIME: Final = 4096
COLUMNS_AT_A_TIME: Final = 1024


class Tile(NamedTuple):
    """Pairs, outputs and inputs that one program multiplies per iteration."""

    pairs: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


@triton.jit
def _sort_pairs(
    index, weights, pairs, starts, num_pairs, E: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # Program e finds the start of expert e by counting the pairs of earlier experts, so no program
    # waits for another. Dropped pairs count as expert E and come last.
    expert = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, num_pairs, BLOCK):
        pair = begin + tl.arange(0, BLOCK)
        before += (_expert_of(index, weights, pair, num_pairs, E) < expert).to(tl.int32)
    start = tl.sum(before, 0)
    tl.store(starts + expert, start)
    for begin in range(0, num_pairs, BLOCK):
        pair = begin + tl.arange(0, BLOCK)
        mine = _expert_of(index, weights, pair, num_pairs, E) == expert
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(pairs + start + rank, pair, mine)
        start += tl.sum(mine.to(tl.int32), 0)


@triton.jit
def _expert_of(index, weights, pair, num_pairs, E: tl.constexpr):
    inside = pair < num_pairs
    kept = tl.load(weights + pair, inside, 0.0) != 0
    expert = tl.minimum(tl.load(index + pair, inside, 0), E).to(tl.int32)
    # Beyond the last pair: an expert without a program.
    return tl.where(inside, tl.where(kept, expert, E), E + 1)


@triton.jit
def _find_tile(starts, tile, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return the tile's expert (E if the tile doesn't exist), first row and last row + 1."""
    number = tl.arange(0, BLOCK_E)
    first = tl.load(starts + number, number < E, 0)
    last = tl.load(starts + number + 1, number < E, 0)
    tiles = (last - first + BLOCK_P - 1) // BLOCK_P
    is_before = (tl.cumsum(tiles, 0) <= tile) & (number < E)
    expert = tl.sum(is_before.to(tl.int32), 0)
    row = tl.sum(tl.where(number == expert, first, 0), 0)
    row += (tile - tl.sum(tl.where(is_before, tiles, 0), 0)) * BLOCK_P
    end = tl.sum(tl.where(number == expert, last, 0), 0)
    return expert, row, end


@triton.jit
def _multiply_groups(
    inputs, weight, bias, pairs, starts, outputs, num_pairs,
    stride_expert, stride_row, stride_column,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IS_UP: tl.constexpr, IS_GATED: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Up reads a token's row for each pair and writes rows in sorted order; down reads sorted
    # rows and writes each to the row of its pair.
    expert, begin, end = _find_tile(starts, tl.program_id(1), E, BLOCK_E, BLOCK_P)
    if expert < E:
        sorted_row = begin + tl.arange(0, BLOCK_P)
        is_row = sorted_row < end
        # Rows past the group are computed from arbitrary data and not stored.
        safe_row = tl.minimum(sorted_row, num_pairs - 1)
        pair = tl.load(pairs + safe_row)
        source = (pair // K if IS_UP else safe_row).to(tl.int64)
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        safe_weight_row = row % ROWS
        x_start = inputs + source[:, None] * COLUMNS
        w_start = weight + expert.to(tl.int64) * stride_expert
        w_start += safe_weight_row[None, :] * stride_row
        first = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        second = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
        for left in range(0, COLUMNS, BLOCK_C):
            column = left + tl.arange(0, BLOCK_C)
            if COLUMNS % BLOCK_C == 0:
                x = tl.load(x_start + column[None, :])
                w = tl.load(w_start + column[:, None] * stride_column)
            else:
                x = tl.load(x_start + column[None, :], (column < COLUMNS)[None, :], 0.0)
                inside = (column < COLUMNS)[:, None]
                w = tl.load(w_start + column[:, None] * stride_column, inside, 0.0)
            first = tl.dot(x, w, first, input_precision=PRECISION)
            if IS_GATED:
                pointer = w_start + ROWS * stride_row + column[:, None] * stride_column
                if COLUMNS % BLOCK_C == 0:
                    w = tl.load(pointer)
                else:
                    w = tl.load(pointer, (column < COLUMNS)[:, None], 0.0)
                second = tl.dot(x, w, second, input_precision=PRECISION)
        if IS_GATED:
            first = first * tl.sigmoid(first) * second
        if HAS_BIAS:
            first += tl.load(bias + expert * ROWS + safe_weight_row).to(tl.float32)[None, :]
        target = (safe_row if IS_UP else pair).to(tl.int64)
        where = outputs + target[:, None] * ROWS + row[None, :]
        mask = is_row[:, None] & (row < ROWS)[None, :]
        tl.store(where, first.to(outputs.dtype.element_ty), mask)


@triton.jit
def _sum_slots(
    outputs, index, weights, mixed, E: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.arange(0, BLOCK_K)
    pair = token * K + slot
    weight = tl.load(weights + pair, slot < K, 0.0).to(tl.float32)
    kept = (weight != 0) & (tl.load(index + pair, slot < K, E) < E)
    # Rows of dropped pairs are uninitialised: the mask excludes NaN.
    mask = kept[:, None] & (column < H)[None, :]
    row = tl.load(outputs + pair[:, None] * H + column[None, :], mask, 0.0).to(tl.float32)
    total = tl.sum(row * weight[:, None], 0)
    tl.store(mixed + token * H + column, total.to(mixed.dtype.element_ty), column < H)


def mix_grouped(
    experts: ExpertWeights, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Mix the kept experts of each token, with one program per tile of pairs that share an expert.

    Args, returns: as in `mix_torch`. Outputs are rounded to the weights' dtype before weighting,
    and summed per token in float32, in the order of the slots.
    """
    hidden = hidden_TH.to(experts.up.dtype).contiguous()
    index, weights = index_TK.contiguous(), weights_TK.contiguous()
    num_tokens, num_slots = index.shape
    num_experts, hidden_size = experts.up.shape[0], hidden.shape[1]
    pairs = index.new_empty(index.numel(), dtype=torch.int32)
    starts = index.new_empty(num_experts + 1, dtype=torch.int32)
    block = min(PAIRS_AT_A_TIME, triton.next_power_of_2(pairs.numel()))
    _sort_pairs[(num_experts + 1,)](
        index, weights, pairs, starts, pairs.numel(), num_experts, block, num_warps=8
    )
    inner = _grouped_linear(experts, hidden, pairs, starts, num_slots, is_up=True)
    if not experts.is_silu_gated:
        inner = experts.activate(inner).contiguous()
    outputs = _grouped_linear(experts, inner, pairs, starts, num_slots, is_up=False)
    if experts.normalize is not None:
        outputs = experts.normalize(outputs).contiguous()
    mixed = torch.empty_like(hidden_TH, memory_format=torch.contiguous_format)
    block = min(COLUMNS_AT_A_TIME, triton.next_power_of_2(hidden_size))
    _sum_slots[num_tokens, triton.cdiv(hidden_size, block)](
        outputs, index, weights, mixed, num_experts, num_slots, hidden_size,
        triton.next_power_of_2(num_slots), block,
    )  # fmt: skip
    return mixed


def _grouped_linear(
    experts: ExpertWeights,
    inputs: Tensor,
    pairs: Tensor,
    starts: Tensor,
    num_slots: int,
    *,
    is_up: bool,
) -> Tensor:
    weight = experts.up if is_up else experts.down
    bias = experts.up_bias if is_up else experts.down_bias
    num_experts, num_rows, num_columns = weight.shape
    is_gated = is_up and experts.is_silu_gated
    if is_gated:
        num_rows //= 2
    tile = choose_tile(pairs.numel() // num_experts, weight.dtype, is_gated=is_gated)
    # Each expert has at most one partial tile.
    num_tiles = min(pairs.numel(), pairs.numel() // tile.pairs + num_experts)
    outputs = inputs.new_empty(pairs.numel(), num_rows)
    _multiply_groups[triton.cdiv(num_rows, tile.outputs), num_tiles](
        inputs, weight, bias, pairs, starts, outputs, pairs.numel(),
        *weight.stride(), num_experts, num_slots, num_rows, num_columns,
        is_up, is_gated, bias is not None, triton.next_power_of_2(num_experts),
        tile.pairs, tile.outputs, tile.inputs, "tf32x3", num_warps=tile.num_warps,
        # Shared memory of older GPUs suffices for two stages.
        num_stages=tile.num_stages if runs_on_hopper() else 2,
    )  # fmt: skip
    return outputs


def choose_tile(pairs_per_expert: int, dtype: torch.dtype, *, is_gated: bool) -> Tile:
    """Choose a tile by the mean number of pairs per expert if none were dropped.

    Measured on one H100 with OLMoE-1B-7B's experts, where 8 pairs per expert are 64 tokens. A gated
    product reads two blocks of weights, so its tile is narrower.
    """
    if dtype == torch.float32:
        return Tile(16 if pairs_per_expert <= 16 else 64, 64, 32, 4, 2)
    if pairs_per_expert <= 8:
        return Tile(16, 32 if is_gated else 64, 256, 4, 3)
    if pairs_per_expert <= 32:
        return Tile(32, 64 if is_gated else 128, 128, 4, 3)
    if pairs_per_expert <= 64:
        return Tile(64, 64 if is_gated else 128, 64, 4, 4)
    return Tile(128, 128 if is_gated else 256, 64, 8, 4)
