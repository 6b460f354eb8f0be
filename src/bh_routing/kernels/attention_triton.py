"""Triton attention for one new token per sequence, and programmatic dependent launch."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls


@triton.jit
def let_next_start(OVERLAPS: tl.constexpr):
    """Allow the next kernel to start once every program of this one has reached this call."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAPS: tl.constexpr):
    """Wait until the previous kernel has ended and its writes are visible."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def _weights_of(norm_weight, head, D: tl.constexpr, NORM: tl.constexpr):
    """Load one head's norm weights, and the same with its halves exchanged."""
    d = tl.arange(0, D)
    if NORM == "none":
        return d, d
    else:
        norm_weight += head * D if NORM == "row" else 0
        return tl.load(norm_weight + d), tl.load(norm_weight + (d + D // 2) % D)


@triton.jit
def _read(row, head, WIDTH: tl.constexpr, P: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr):
    """Load one head of a query or key row, the same with halves exchanged, and the norm's input."""
    d = tl.arange(0, D)
    here = tl.load(row + head * D + d)
    there = tl.load(row + head * D + (d + D // 2) % D)
    if NORM == "row":
        column = tl.arange(0, P)
        return here, there, tl.load(row + column, column < WIDTH, 0.0)
    else:
        return here, there, here


@triton.jit
def _turn(
    here, there, whole, weight, other_weight, cos, sin, eps,
    WIDTH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Normalise a head over the row or itself, and rotate it; sin carries the sign."""
    if NORM != "none":
        whole = whole.to(tl.float32)
        count = WIDTH if NORM == "row" else whole.shape[0]
        scale = tl.rsqrt(tl.sum(whole * whole, 0) / count + eps)
        here = (here.to(tl.float32) * scale).to(here.dtype) * weight
        there = (there.to(tl.float32) * scale).to(there.dtype) * other_weight
    return here * cos + there * sin


@triton.jit
def _meet(query_D, key_CD, value_CD, is_seen_C, scaling, top, total, mixed_D):
    """Update a query's attention with more keys: online softmax, Milakov & Gimelshein (2018)."""
    score_C = tl.sum(key_CD.to(tl.float32) * query_D[None, :], 1) * scaling
    score_C = tl.where(is_seen_C, score_C, -float("inf"))
    new_top = tl.maximum(top, tl.max(score_C, 0))
    shrink = tl.exp(top - new_top)
    fraction_C = tl.exp(score_C - new_top)
    mixed_D = mixed_D * shrink + tl.sum(fraction_C[:, None] * value_CD.to(tl.float32), 0)
    return new_top, total * shrink + tl.sum(fraction_C, 0), mixed_D


@triton.jit
def _meet_part(
    query_D, key_CD, value_CD, keys, values, first, end, scaling,
    D: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend to one part of the cache, whose first block is already loaded."""
    top, total = tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32)
    mixed_D = tl.zeros([D], tl.float32)
    c = first + tl.arange(0, BLOCK)
    top, total, mixed_D = _meet(query_D, key_CD, value_CD, c < end, scaling, top, total, mixed_D)
    for offset in range(BLOCK, PART, BLOCK):
        if first + offset < end:
            c = first + offset + tl.arange(0, BLOCK)
            place_CD = c[:, None] * D + tl.arange(0, D)[None, :]
            key_CD = tl.load(keys + place_CD, (c < end)[:, None], 0.0)
            value_CD = tl.load(values + place_CD, (c < end)[:, None], 0.0)
            top, total, mixed_D = _meet(
                query_D, key_CD, value_CD, c < end, scaling, top, total, mixed_D
            )
    return top, total, mixed_D


@triton.jit
def _join(
    parts, tops, sums, out, pair, num_used, D: tl.constexpr, PARTS: tl.constexpr, S: tl.constexpr
):
    """Combine the results of the used parts of one sequence and head, in order."""
    s, d = tl.arange(0, S), tl.arange(0, D)
    slot_S = pair * PARTS + s
    # Other programs wrote it: read from L2, not from this multiprocessor's L1 cache.
    top_S = tl.load(tops + slot_S, s < num_used, -float("inf"), cache_modifier=".cg")
    sum_S = tl.load(sums + slot_S, s < num_used, 0.0, cache_modifier=".cg")
    place_SD = slot_S[:, None] * D + d[None, :]
    part_SD = tl.load(parts + place_SD, (s < num_used)[:, None], 0.0, cache_modifier=".cg")
    fraction_S = tl.exp(top_S - tl.max(top_S, 0))
    joined_D = tl.sum(fraction_S[:, None] * part_SD, 0) / tl.sum(fraction_S * sum_S, 0)
    tl.store(out + pair * D + d, joined_D.to(out.dtype.element_ty))


@triton.jit
def attend(
    row, query_norm, key_norm, cos, sin, keys, values, position, parts, tops, sums, arrived, out,
    eps, scaling, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, S: tl.constexpr,
    P: tl.constexpr, NORM: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Attend with one head of one sequence to the new token (part 0) or to a part of the cache.

    The last program of a sequence and head combines its used parts, in order.
    """
    pair, part = tl.program_id(0), tl.program_id(1)
    sequence, head = pair // N, pair % N
    at = tl.load(position + sequence)
    num_used = 1 + tl.cdiv(at, PART)
    if part >= num_used:
        return
    group = head // (N // G)
    d = tl.arange(0, D)
    # Earlier steps wrote the older positions, so they may be read before the wait.
    cos_D, sin_D = tl.load(cos + at * D + d), tl.load(sin + at * D + d)
    first = tl.where(part == 0, at, (part - 1) * PART)
    end = tl.minimum(first + PART, at)
    cache = (sequence * G + group).to(tl.int64) * C * D
    row += sequence * (N + 2 * G) * D
    c = first + tl.arange(0, BLOCK)
    place_CD = cache + c[:, None] * D + d[None, :]
    key_CD = tl.load(keys + place_CD, (c < end)[:, None], 0.0)
    value_CD = tl.load(values + place_CD, (c < end)[:, None], 0.0)
    weight_D, other_weight_D = _weights_of(query_norm, head, D, NORM)
    key_weight_D, other_key_weight_D = _weights_of(key_norm, group, D, NORM)
    wait_for_previous(OVERLAPS)
    # All loads are issued before any arithmetic, to overlap their latency.
    here_D, there_D, whole = _read(row, head, N * D, P, D, NORM)
    new_here_D, new_there_D, new_whole = _read(row + N * D, group, G * D, P, D, NORM)
    new_value_D = tl.load(row + (N + G) * D + group * D + d)
    # Not earlier: these small loads would queue behind the next kernel's weights.
    let_next_start(OVERLAPS)
    query_D = _turn(
        here_D, there_D, whole, weight_D, other_weight_D, cos_D, sin_D, eps, N * D, NORM
    ).to(tl.float32)
    if part == 0:
        new_key_D = _turn(
            new_here_D, new_there_D, new_whole, key_weight_D, other_key_weight_D, cos_D, sin_D,
            eps, G * D, NORM,
        )  # fmt: skip
        if head % (N // G) == 0:
            tl.store(keys + cache + at * D + d, new_key_D)
            tl.store(values + cache + at * D + d, new_value_D)
        top = tl.sum(query_D * new_key_D.to(tl.float32), 0) * scaling
        total = tl.full([], 1.0, tl.float32)
        mixed_D = new_value_D.to(tl.float32)
    else:
        top, total, mixed_D = _meet_part(
            query_D, key_CD, value_CD, keys + cache, values + cache, first, end, scaling,
            D, PART, BLOCK,
        )  # fmt: skip
    slot = pair * PARTS + part
    tl.store(parts + slot * D + d, mixed_D)
    tl.store(tops + slot, top)
    tl.store(sums + slot, total)
    tl.debug_barrier()
    if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == num_used - 1:
        _join(parts, tops, sums, out, pair, num_used, D, PARTS, S)
        tl.store(arrived + pair, 0)  # for the next layer
