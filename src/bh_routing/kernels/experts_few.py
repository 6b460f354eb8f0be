# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Sparse experts for a few tokens: two kernels that read each kept slot's weights once.

Generating one token multiplies matrices by a vector: the time is that of reading the weights. A
slot of weight 0 ends its programs before they read any, so half the experts is half the bytes. No
host sync, and shapes that depend on nothing but the input's: safe in a CUDA graph.

From Hopper on, the second kernel starts while the first one ends (programmatic dependent launch)
and reads its weights, before it waits for what the first one wrote.

Axes: T tokens, K slots, S = T * K slots of all tokens, E experts, H hidden, F expert hidden,
N rows of `up`.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bh_routing.kernels.experts_layout import ExpertWeights, runs_on_hopper
from bh_routing.kernels.overlap import let_next_start, wait_for_previous


class Block(NamedTuple):
    """How much of a matrix one program reads: rows, columns at a time, and slots at a time."""

    rows: int
    columns: int
    slots: int
    num_warps: int


# Measured on one H100 with OLMoE-1B-7B's experts, one and four tokens, 8 and 4 kept, and in a whole
# step: no other block was quicker there at 8 and at 4.
UP: Final = Block(rows=4, columns=1024, slots=1, num_warps=4)
DOWN: Final = Block(rows=2, columns=1024, slots=4, num_warps=2)
# Neighbours in memory are outputs here. Not measured.
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
    # In this order, so that the next kernel, which starts when all have waited, may read what came
    # before this one.
    wait_for_previous(OVERLAPS)
    let_next_start(OVERLAPS)
    # The slot runs fastest: two tokens with one expert read its rows at about the same time.
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
            # Inner rows of dropped slots were never written: the mask keeps their NaN out.
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
    """Mix the kept experts of each token, one program a slot and block of rows.

    Args, returns: as `mix_torch`; products and sums are float32, in one order.
    """
    assert experts.normalize is None, "a norm needs each expert's whole output"
    hidden = hidden_TH.to(experts.up.dtype).contiguous()
    index, weights = index_TK.contiguous(), weights_TK.contiguous()
    (num_tokens, num_slots), (num_experts, num_rows, hidden_size) = index.shape, experts.up.shape
    is_gated = experts.is_silu_gated
    if is_gated:
        num_rows //= 2
    # Between the two must be nothing, and what torch compiles it launches in its own way.
    overlaps = is_gated and runs_on_hopper() and not torch.compiler.is_compiling()
    # What a text alone reads is read once, and may leave the cache to what other kernels share.
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
