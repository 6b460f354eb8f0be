# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Triton kernels of rules on decode steps: the mass of each expert, then each token's slots.

Masses are sums of whole numbers, so they equal the reference implementation's bit for bit.

Axes: T tokens, C slots and P experts, all padded to powers of two; E experts, K slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bh_routing.kernels.attention_triton import let_next_start, wait_for_previous
from bh_routing.kernels.experts import runs_on_hopper
from bh_routing.kernels.router import ServedStep, StepPlan
from bh_routing.kernels.router_kernel import IS_INTERPRETED, _mix
from bh_routing.kernels.router_kernel import bind as bind_token_router
from bh_routing.nulls.contributions import STEP_SIZES
from bh_routing.rules.base import LayerContext
from bh_routing.rules.fixed import TopK
from bh_routing.rules.plan import Plan
from bh_routing.rules.router import RoutedSlots, Router, SoftmaxFamily
from bh_routing.rules.step import Between

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
def _is_voter(kinds, weights, t_X, num_tokens, K: tl.constexpr, ROWS: tl.constexpr):
    """Return which tokens decode in the step; in a server, NaN of one request doesn't vote."""
    is_voter_X = t_X < num_tokens
    if ROWS == "real":
        is_voter_X &= tl.load(kinds + t_X, is_voter_X, 0) != 0
    elif ROWS == "served":
        weight_X = tl.load(weights + t_X * K, is_voter_X, 0.0)
        is_voter_X &= (tl.load(kinds + t_X, is_voter_X, 0) == 1) & (weight_X == weight_X)
    return is_voter_X


@triton.jit
def _count_voters(
    kinds, weights, num_tokens, K: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    if ROWS == "all":
        return num_tokens
    else:
        is_voter_T = _is_voter(kinds, weights, tl.arange(0, T), num_tokens, K, ROWS)
        return tl.sum(is_voter_T.to(tl.int32), 0)


@triton.jit
def _weigh_expert(
    index, weights, kinds, scale, norms, p_values, is_present, is_floor,
    tables, starts, lower, low_weight, high_weight, num_tokens, min_k,
    OWN: tl.constexpr, K: tl.constexpr, C: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr,
    COARSE: tl.constexpr, HAS_P: tl.constexpr, IS_SQUARED: tl.constexpr, ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Compute the norm of one expert's scores in the step, and its p-value if HAS_P.

    By hand: two tokens have the expert with scores 3 and 4, so the mass is 25 and its root 5. Of a
    table (1, 2, 6) two are at most 5: the p-value is 3 / 4.
    """
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    expert = tl.program_id(0)
    t_T1, c_1C = tl.arange(0, T)[:, None], tl.arange(0, C)[None, :]
    is_slot_TC = _is_voter(kinds, weights, t_T1, num_tokens, K, ROWS) & (c_1C < OWN)
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
    if IS_SQUARED:
        ratio_TC *= ratio_TC
    # Adding 2 ** 52 rounds to whole numbers, halves to even.
    units_TC = (ratio_TC * 1099511627776.0 + 4503599627370496.0) - 4503599627370496.0
    total = tl.sum(tl.sum(units_TC.to(tl.int64), 1), 0).to(tl.float64) / 1099511627776.0
    norm = (largest * (tl.sqrt(total) if IS_SQUARED else total)).to(tl.float32)
    tl.store(norms + expert, norm)
    tl.store(is_present + expert, tl.max(tl.max(is_mine_TC.to(tl.int32), 1), 0))
    is_floor_TC = is_mine_TC & (rank_TC < min_k)
    tl.store(is_floor + expert, tl.max(tl.max(is_floor_TC.to(tl.int32), 1), 0))
    if HAS_P:
        count = tl.minimum(_count_voters(kinds, weights, num_tokens, K, T, ROWS), MOST)
        at = starts + tl.load(lower + count)
        first, second, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        p_value = _lower_tail(tables + first, norm, second - first, COARSE)
        p_value *= tl.load(low_weight + count)
        other = _lower_tail(tables + second, norm, end - second, COARSE)
        tl.store(p_values + expert, p_value + other * tl.load(high_weight + count))


@triton.jit
def _find_read(
    kinds, weights, norms, p_values, is_present, is_floor, cut_off, alpha, num_tokens, budget,
    E: tl.constexpr, P: tl.constexpr, K: tl.constexpr, T: tl.constexpr, MOST: tl.constexpr,
    READS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return which experts the step reads.

    By hand, BH at level 0.5 over p-values (0.1, 0.4, 0.9): 0.4 * 3 / 2 is too large, 0.1 * 3 isn't,
    so the first expert isn't read, and the other two are.
    """
    e_P = tl.arange(0, P)
    is_present_P = tl.load(is_present + e_P, e_P < E, 0) != 0
    is_read_P = tl.load(is_floor + e_P, e_P < E, 0) != 0
    if READS == "bh":
        p_P = tl.load(p_values + e_P, e_P < E, 0.0)
        p_P = tl.where(is_present_P, p_P, float("inf"))
        # The last rank of equal p-values, whose critical value is the largest.
        rank_P = tl.sum((p_P[None, :] <= p_P[:, None]).to(tl.int32), 1)
        size = tl.sum(is_present_P.to(tl.int32), 0)
        is_below_P = p_P * (size.to(tl.float64) / rank_P.to(tl.float64)) <= tl.load(alpha)
        last = tl.max(tl.where(is_below_P, p_P, -1.0), 0)
        is_read_P |= is_present_P & (p_P > last)
    else:
        norm_P = tl.load(norms + e_P, e_P < E, -1.0)
        if READS == "budget":
            is_before_PP = e_P[None, :] < e_P[:, None]
            is_before_PP = (norm_P[None, :] == norm_P[:, None]) & is_before_PP
            is_before_PP |= norm_P[None, :] > norm_P[:, None]
            is_read_P |= is_present_P & (tl.sum(is_before_PP.to(tl.int32), 1) < budget)
        else:
            count = tl.minimum(_count_voters(kinds, weights, num_tokens, K, T, ROWS), MOST)
            is_read_P |= is_present_P & (norm_P.to(tl.float64) > tl.load(cut_off + count))
    return is_read_P


@triton.jit
def _store_served(
    new_index, new_weights, expert_1C, weight_1C, keep_1C, best_11, c_1C,
    OWN: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write OWN slots: candidates, of which at most OWN are kept, to the left if there are more."""
    place_1C = c_1C
    is_rest_1C = keep_1C == 0
    if K > OWN:
        place_1C = tl.cumsum(keep_1C.to(tl.int32), 1) - 1
        is_rest_1C = c_1C >= tl.sum(keep_1C.to(tl.int32), axis=1, keep_dims=True)
    is_rest_1C &= c_1C < OWN
    tl.store(new_index + place_1C, expert_1C, keep_1C)
    tl.store(new_weights + place_1C, weight_1C, keep_1C)
    tl.store(new_index + c_1C, best_11, is_rest_1C)
    tl.store(new_weights + c_1C, tl.zeros_like(weight_1C), is_rest_1C)


@triton.jit
def _keep_read(
    logits, index, weights, kinds, norms, p_values, is_present, is_floor, cut_off, alpha,
    new_index, new_weights, keep, num_tokens, budget, temperature,
    E: tl.constexpr, P: tl.constexpr, OWN: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    T: tl.constexpr, MOST: tl.constexpr, READS: tl.constexpr, NORMALISES: tl.constexpr,
    CONVENTION: tl.constexpr, TEMPERED: tl.constexpr, LIBDEVICE: tl.constexpr,
    ROWS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Keep one token's slots whose expert the step reads, at most OWN.

    ROWS "all" and "real" write K slots of each token, and give a token that isn't real none.
    "served" writes OWN slots, the kept ones first if there are more candidates, for the kinds of
    `router.ServedStep`.
    """
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    token = tl.program_id(0)
    e_P, c_1C = tl.arange(0, P), tl.arange(0, C)[None, :]
    is_read_P = _find_read(
        kinds, weights, norms, p_values, is_present, is_floor, cut_off, alpha, num_tokens, budget,
        E, P, K, T, MOST, READS, ROWS,
    )  # fmt: skip
    is_slot_1C = c_1C < K
    expert_1C = tl.load(index + token * K + c_1C, is_slot_1C, 0)
    is_it_1CP = tl.expand_dims(expert_1C, 2) == e_P[None, None, :]
    is_kept_1CP = is_it_1CP & is_read_P[None, None, :]
    keep_1C = (tl.max(is_kept_1CP.to(tl.int32), 2) != 0) & is_slot_1C
    if K > OWN:
        keep_1C &= tl.cumsum(keep_1C.to(tl.int32), 1) <= OWN
    if ROWS != "all":
        kind = tl.load(kinds + token).to(tl.int32)
    if ROWS == "real":
        keep_1C |= (kind == 0) & is_slot_1C  # weights of no slots would be NaN
    elif ROWS == "served":
        keep_1C = tl.where(kind == 2, c_1C < OWN, keep_1C & (kind == 1))
    weight_1C = tl.load(weights + token * K + c_1C, is_slot_1C, 0.0).to(tl.float32)
    logit_1C = weight_1C
    if TEMPERED:
        logit_1C = tl.load(logits + token * E + expert_1C).to(tl.float32)
    mixed_1C = _mix(
        weight_1C, keep_1C, logit_1C, c_1C, OWN, temperature, NORMALISES, CONVENTION, TEMPERED,
        LIBDEVICE,
    )  # fmt: skip
    first_11 = tl.min(tl.where(keep_1C, c_1C, C), axis=1, keep_dims=True)
    best_11 = tl.sum(tl.where(c_1C == first_11, expert_1C, 0), axis=1, keep_dims=True)
    dtype = new_weights.dtype.element_ty
    if ROWS == "served":
        norm_P = tl.load(norms + e_P, e_P < E, -1.0)
        largest_P = tl.where(norm_P == tl.max(norm_P, 0), e_P, P)
        best_11 = tl.where(first_11 == C, tl.min(largest_P, 0), best_11)
        mixed_1C = tl.where(kind == 2, weight_1C, mixed_1C).to(dtype)
        start = token * OWN
        _store_served(
            new_index + start, new_weights + start, expert_1C, mixed_1C, keep_1C, best_11, c_1C,
            OWN, K,
        )  # fmt: skip
    else:
        place_1C = token * K + c_1C
        tl.store(new_index + place_1C, tl.where(keep_1C, expert_1C, best_11), is_slot_1C)
        if ROWS == "real":
            keep_1C &= kind != 0
            mixed_1C = tl.where(kind == 0, 0.0, mixed_1C)
        tl.store(new_weights + place_1C, mixed_1C.to(dtype), is_slot_1C)
        tl.store(keep + place_1C, keep_1C, is_slot_1C)


def _p_value_tables(plan: StepPlan) -> tuple[Tensor | None, Sequence[Tensor | None], int]:
    """Return alpha, the arguments of `_weigh_expert` that give p-values, and a table's blocks.

    These are all tables in a row, their starts, and by number of tokens the table of the next
    smaller size, its weight and that of the next larger one.
    """
    if not plan.tables:
        return None, [None] * 5, 1
    device, lengths = plan.scale_E.device, [len(table) for table in plan.tables]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    lower_B, weight_B = Between.on(torch.device("cpu"))
    arguments = (torch.cat(plan.tables), starts, lower_B.int(), 1 - weight_B, weight_B)
    alpha = torch.tensor([plan.alpha], dtype=torch.float64, device=device)
    num_blocks = int(triton.next_power_of_2(triton.cdiv(max(lengths), FINE.value)))
    return alpha, [argument.to(device) for argument in arguments], num_blocks


def _numbers(own: int, num_slots: int) -> dict[str, Any]:
    """Return arguments that both kernels of a step share."""
    numbers: dict[str, Any] = {
        "OWN": own,
        "K": num_slots,
        "C": triton.next_power_of_2(num_slots),
        "MOST": STEP_SIZES[-1],
        "OVERLAPS": not IS_INTERPRETED and runs_on_hopper(),
        # A fused multiply-add rounds once, the reference implementation twice.
        "enable_fp_fusion": False,
        "num_warps": 4,
    }
    if numbers["OVERLAPS"]:
        numbers["launch_pdl"] = True
    return numbers


def bind(plan: StepPlan, rule: Any, context: LayerContext, family: SoftmaxFamily) -> Router:
    """Return a layer's router; logits and mask are contiguous, on the layer's device."""
    own = context.model_top_k
    # In prefill, which has no decode steps, a token keeps its own top-k.
    in_prefill = TopK(rule.num_candidates(own), weights=rule.weights, temperature=rule.temperature)
    route_prompt = bind_token_router(Plan(decision="count", max_k=own), in_prefill, context, family)
    propose, decide = _bind_step(plan, rule, context, family)

    def route(router_logits_TE: Tensor, is_real_BS: Tensor | None = None) -> RoutedSlots:
        if is_real_BS is not None and is_real_BS.shape[1] > 1:
            return route_prompt(router_logits_TE, is_real_BS)
        slots, rows = propose(router_logits_TE), "all" if is_real_BS is None else "real"
        routed = RoutedSlots(*(torch.empty_like(tensor) for tensor in slots))
        decide(router_logits_TE, slots, is_real_BS, rows, routed)
        return routed

    return route


def bind_served(
    plan: StepPlan, rule: Any, context: LayerContext, family: SoftmaxFamily
) -> ServedStep:
    """Return a layer's router for passes that hold padding, and tokens of prompts."""
    propose, decide = _bind_step(plan, rule, context, family)

    def route(router_logits_TE: Tensor, kind_T: Tensor, index_TK: Tensor) -> Tensor:
        weights_TK = index_TK.new_empty(index_TK.shape, dtype=family.weights_dtype)
        slots = propose(router_logits_TE)
        decide(router_logits_TE, slots, kind_T, "served", (index_TK, weights_TK, None))
        return weights_TK

    return route


def _bind_step(
    plan: StepPlan, rule: Any, context: LayerContext, family: SoftmaxFamily
) -> tuple[Router, Callable[..., None]]:
    """Return the router that proposes candidates, and the function that decides on a step's."""
    num_experts, own, device = context.num_experts, context.model_top_k, context.device
    num_slots = rule.num_candidates(own)
    propose = bind_token_router(
        Plan(decision="count", max_k=num_slots), TopK(num_slots), context, family
    )
    alpha, tables, num_blocks = _p_value_tables(plan)
    numbers = _numbers(own, num_slots)
    reads = "bh" if plan.tables else "cut_off" if plan.budget is None else "budget"

    def decide(
        router_logits_TE: Tensor,
        slots: RoutedSlots,
        kinds: Tensor | None,
        rows: str,
        outputs: Sequence[Tensor | None],
    ) -> None:
        num_tokens, (index, weights) = len(router_logits_TE), slots[:2]
        norms = torch.empty(num_experts, dtype=torch.float32, device=device)
        p_values = torch.empty(num_experts, dtype=torch.float64, device=device)
        flags = torch.empty(2, num_experts, dtype=torch.int32, device=device)
        sizes = {"T": triton.next_power_of_2(num_tokens), "ROWS": rows}
        _weigh_expert[(num_experts,)](
            index, weights, kinds, plan.scale_E, norms, p_values, *flags, *tables,
            num_tokens, plan.min_k, COARSE=num_blocks, HAS_P=reads == "bh",
            IS_SQUARED=plan.is_squared, **sizes, **numbers,
        )  # fmt: skip
        _keep_read[(num_tokens,)](
            router_logits_TE, index, weights, kinds, norms, p_values, *flags,
            plan.cut_off_B, alpha, *outputs, num_tokens, plan.budget, rule.temperature,
            E=num_experts, P=triton.next_power_of_2(num_experts), READS=reads,
            NORMALISES=family.normalises, CONVENTION=rule.weights,
            TEMPERED=rule.temperature != 1, LIBDEVICE=not IS_INTERPRETED, **sizes, **numbers,
        )  # fmt: skip

    return propose, decide
