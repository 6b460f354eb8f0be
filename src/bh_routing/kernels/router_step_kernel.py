# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels of rules on decode steps: the mass of each expert, then each token's slots.

Masses are sums of whole numbers, so they equal the reference implementation's bit for bit.

Axes: T tokens, C slots and P experts, all padded to powers of two; E experts, K slots.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bh_routing.kernels.attention_triton import let_next_start, wait_for_previous
from bh_routing.kernels.experts import runs_on_hopper
from bh_routing.kernels.router import StepPlan, p_value_tables
from bh_routing.kernels.router_kernel import IS_INTERPRETED, _mix
from bh_routing.kernels.router_kernel import bind as bind_token_router
from bh_routing.rules.base import LayerContext
from bh_routing.rules.fixed import TopK
from bh_routing.rules.plan import Plan
from bh_routing.rules.router import RoutedSlots, Router, SoftmaxFamily

FINE = tl.constexpr(128)


@triton.jit
def _lower_tail(table, norm, N, COARSE: tl.constexpr):
    """Return (1 + #{table <= norm}) / (N + 1): by blocks of FINE scores, then within one."""
    block = tl.arange(0, COARSE)
    last = tl.load(table + tl.minimum(block * FINE + FINE - 1, N - 1))
    begin = tl.sum(((block * FINE < N) & (last <= norm)).to(tl.int32), 0) * FINE
    place = begin + tl.arange(0, FINE)
    score = tl.load(table + place, place < N, float("inf"))
    count = tl.minimum(begin, N) + tl.sum(((place < N) & (score <= norm)).to(tl.int32), 0)
    return (1 + count).to(tl.float64) / (N + 1).to(tl.float64)


@triton.jit
def _weigh_expert(
    index, weights, scale, norms, p_values, is_present, is_floor, low, high, numbers,
    num_tokens, num_low, num_high, min_k, K: tl.constexpr, C: tl.constexpr, T: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_P: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Compute the root of one expert's mass in the step, and its p-value if HAS_P.

    By hand: two tokens have the expert with scores 3 and 4, so the mass is 25 and its root 5. Of a
    table (1, 2, 6) two are at most 5: the p-value is 3 / 4.
    """
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    expert = tl.program_id(0)
    t_T1, c_1C = tl.arange(0, T)[:, None], tl.arange(0, C)[None, :]
    is_slot_TC = (t_T1 < num_tokens) & (c_1C < K)
    at_TC = t_T1 * K + c_1C
    expert_TC = tl.load(index + at_TC, is_slot_TC, 0)
    weight_TC = tl.load(weights + at_TC, is_slot_TC, 0.0).to(tl.float32)
    score_TC = tl.where(is_slot_TC, weight_TC * tl.load(scale + expert_TC), -float("inf"))
    other_T1C, own_TC1 = tl.expand_dims(score_TC, 1), tl.expand_dims(score_TC, 2)
    is_before_1CC = tl.expand_dims(c_1C, 1) < tl.expand_dims(c_1C, 2)
    is_better_TCC = (other_T1C > own_TC1) | ((other_T1C == own_TC1) & is_before_1CC)
    rank_TC = tl.sum(is_better_TCC.to(tl.int32), axis=2)
    is_mine_TC = is_slot_TC & (expert_TC == expert)
    mine_TC = tl.where(is_mine_TC, score_TC, 0.0).to(tl.float64)
    largest = tl.max(tl.max(mine_TC, 1), 0)
    ratio_TC = mine_TC / tl.where(largest > 0, largest, 1.0)
    # Adding 2 ** 52 rounds to whole numbers, halves to even.
    units_TC = (ratio_TC * ratio_TC * 1099511627776.0 + 4503599627370496.0) - 4503599627370496.0
    sum_ = tl.sum(tl.sum(units_TC.to(tl.int64), 1), 0)
    norm = (largest * tl.sqrt(sum_.to(tl.float64) / 1099511627776.0)).to(tl.float32)
    tl.store(norms + expert, norm)
    tl.store(is_present + expert, tl.max(tl.max(is_mine_TC.to(tl.int32), 1), 0))
    is_floor_TC = is_mine_TC & (rank_TC < min_k)
    tl.store(is_floor + expert, tl.max(tl.max(is_floor_TC.to(tl.int32), 1), 0))
    if HAS_P:
        low_weight, high_weight = tl.load(numbers + 1), tl.load(numbers + 2)
        p_value = _lower_tail(low, norm, num_low, LOW) * low_weight
        p_value += _lower_tail(high, norm, num_high, HIGH) * high_weight
        tl.store(p_values + expert, p_value)


@triton.jit
def _keep_read(
    index, weights, norms, p_values, is_present, is_floor, cut_off, numbers,
    new_index, new_weights, keep,
    E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, C: tl.constexpr, HAS_P: tl.constexpr,
    NORMALISES: tl.constexpr, CONVENTION: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Keep one token's slots whose expert the step reads.

    By hand, BH at level 0.5 over p-values (0.1, 0.4, 0.9): 0.4 * 3 / 2 is too large, 0.1 * 3 isn't,
    so the first expert isn't read, and the other two are.
    """
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    token = tl.program_id(0)
    e_P, c_1C = tl.arange(0, P), tl.arange(0, C)[None, :]
    is_present_P = tl.load(is_present + e_P, e_P < E, 0) != 0
    is_read_P = tl.load(is_floor + e_P, e_P < E, 0) != 0
    if HAS_P:
        p_P = tl.load(p_values + e_P, e_P < E, 0.0)
        p_P = tl.where(is_present_P, p_P, float("inf"))
        # The last rank of equal p-values, whose critical value is the largest.
        rank_P = tl.sum((p_P[None, :] <= p_P[:, None]).to(tl.int32), 1)
        size = tl.sum(is_present_P.to(tl.int32), 0)
        is_below_P = p_P * (size.to(tl.float64) / rank_P.to(tl.float64)) <= tl.load(numbers)
        last = tl.max(tl.where(is_below_P, p_P, -1.0), 0)
        is_read_P |= is_present_P & (p_P > last)
    else:
        norm_P = tl.load(norms + e_P, e_P < E, 0.0).to(tl.float64)
        is_read_P |= is_present_P & (norm_P > tl.load(cut_off))
    is_slot_1C = c_1C < K
    expert_1C = tl.load(index + token * K + c_1C, is_slot_1C, 0)
    is_it_1CP = tl.expand_dims(expert_1C, 2) == e_P[None, None, :]
    is_kept_1CP = is_it_1CP & is_read_P[None, None, :]
    keep_1C = (tl.max(is_kept_1CP.to(tl.int32), 2) != 0) & is_slot_1C
    weight_1C = tl.load(weights + token * K + c_1C, is_slot_1C, 0.0).to(tl.float32)
    mixed_1C = _mix(
        weight_1C, keep_1C, weight_1C, c_1C, K, 1.0, NORMALISES, CONVENTION, False, False
    )
    first_11 = tl.min(tl.where(keep_1C, c_1C, C), axis=1, keep_dims=True)
    best_11 = tl.sum(tl.where(c_1C == first_11, expert_1C, 0), axis=1, keep_dims=True)
    place_1C = token * K + c_1C
    tl.store(new_index + place_1C, tl.where(keep_1C, expert_1C, best_11), is_slot_1C)
    tl.store(new_weights + place_1C, mixed_1C.to(new_weights.dtype.element_ty), is_slot_1C)
    tl.store(keep + place_1C, keep_1C, is_slot_1C)


def bind(plan: StepPlan, rule: Any, context: LayerContext, family: SoftmaxFamily) -> Router:
    """Return a layer's router: contiguous logits of one step on the layer's device -> slots."""
    num_experts, num_slots, device = context.num_experts, context.model_top_k, context.device
    own = Plan(decision="count", max_k=num_slots)
    propose = bind_token_router(own, TopK(num_slots), context, family)
    overlaps = not IS_INTERPRETED and runs_on_hopper()
    # A fused multiply-add rounds once, the reference implementation twice.
    options: dict[str, Any] = {"enable_fp_fusion": False, "OVERLAPS": overlaps}
    if overlaps:
        options["launch_pdl"] = True
    has_p = plan.cut_off_B is None
    padded_slots = triton.next_power_of_2(num_slots)
    tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def parameters(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        # Kept: a captured graph reads them.
        if num_tokens not in tables:
            tables[num_tokens] = p_value_tables(plan, num_tokens)
        return tables[num_tokens]

    def route(router_logits_TE: Tensor) -> RoutedSlots:
        slots, num_tokens = propose(router_logits_TE), len(router_logits_TE)
        index, weights = slots[:2]
        low = high = numbers = cut_off = plan.scale_E
        if plan.cut_off_B is None:
            low, high, numbers = parameters(num_tokens)
        else:
            cut_off = plan.cut_off_B[min(num_tokens, len(plan.cut_off_B) - 1)]
        norms = torch.empty(num_experts, dtype=torch.float32, device=device)
        p_values = torch.empty(num_experts, dtype=torch.float64, device=device)
        flags = torch.empty(2, num_experts, dtype=torch.int32, device=device)
        _weigh_expert[(num_experts,)](
            index, weights, plan.scale_E, norms, p_values, *flags, low, high, numbers,
            num_tokens, len(low), len(high), plan.min_k, K=num_slots, C=padded_slots,
            T=triton.next_power_of_2(num_tokens), LOW=_blocks(low), HIGH=_blocks(high),
            HAS_P=has_p, num_warps=4, **options,
        )  # fmt: skip
        routed = RoutedSlots(*(torch.empty_like(tensor) for tensor in slots))
        _keep_read[(num_tokens,)](
            index, weights, norms, p_values, *flags, cut_off, numbers, *routed,
            E=num_experts, P=triton.next_power_of_2(num_experts), K=num_slots, C=padded_slots,
            HAS_P=has_p, NORMALISES=family.normalises, CONVENTION=rule.weights, num_warps=4,
            **options,
        )  # fmt: skip
        return routed

    return route


def _blocks(table: Tensor) -> int:
    return int(triton.next_power_of_2(triton.cdiv(len(table), FINE.value)))
