# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The fused router: one kernel scores, sorts, decides and weights blocks of tokens in registers.

Decisions equal the reference implementation's bit for bit, because all compared numbers are
computed in the same way:

- slots are sorted by an integer key, the logit's bits above the expert index, so ties go to the
  smaller index;
- scores take one subtraction, and one correctly rounded division if studentized;
- weights are a softmax summed in torch's order on CUDA, with the same `expf` and a correctly
  rounded division; so keeping every slot leaves the model's weights unchanged.

Axes: B tokens per program, P experts and C slots, both padded to a power of two.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from bh_routing.errors import InputError
from bh_routing.kernels.attention_triton import let_next_start, wait_for_previous
from bh_routing.kernels.experts import runs_on_hopper
from bh_routing.nulls.centred import CentredNull
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.plan import Plan
from bh_routing.rules.router import RoutedSlots, Router, SoftmaxFamily


@triton.jit
def _exp(x, LIBDEVICE: tl.constexpr):
    # tl.exp is an approximation; torch calls libdevice's, which the interpreter lacks.
    return libdevice.exp(x) if LIBDEVICE else tl.exp(x)


@triton.jit
def _keys(logits_BP, expert_P, E: tl.constexpr, P: tl.constexpr):
    """Map (logit, expert) to integers of the same order, smaller experts first."""
    if logits_BP.dtype == tl.float32:
        bits_BP = logits_BP.to(tl.int32, bitcast=True)
        # Negative and positive zero are equal, but their bits differ.
        bits_BP = tl.where((bits_BP & 0x7FFFFFFF) == 0, 0, bits_BP)
        ordered_BP = (bits_BP ^ ((bits_BP >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32
        padding = -9223372036854775808
    else:
        bits_BP = logits_BP.to(tl.int16, bitcast=True).to(tl.int32)
        bits_BP = tl.where((bits_BP & 0x7FFF) == 0, 0, bits_BP)
        ordered_BP = (bits_BP ^ ((bits_BP >> 31) & 0x7FFF)) << 16
        padding = -2147483648
    return tl.where(expert_P < E, ordered_BP | (P - 1 - expert_P), padding)


@triton.jit
def _bit(N: tl.constexpr, i: tl.constexpr):
    """Return bit i of each index, for a tensor of N axes of size 2."""
    return tl.reshape(tl.arange(0, 2), [1] * (N - 1 - i) + [2] + [1] * i)


@triton.jit
def _swap(cube, i: tl.constexpr, stage: tl.constexpr, N: tl.constexpr, LOG_P: tl.constexpr):
    """Swap elements whose indices differ in bit i if they are out of order."""
    partner = tl.sum(cube, axis=N - 1 - i, keep_dims=True) - cube
    # Runs that a later stage merges alternate between descending and ascending.
    takes_larger = _bit(N, i) == 0 if stage == LOG_P else _bit(N, i) != _bit(N, stage)
    return tl.where((partner > cube) == takes_larger, partner, cube)


@triton.jit
def _sort_descending(x_BP, LOG_B: tl.constexpr, LOG_P: tl.constexpr, FIRST: tl.constexpr = 1):
    """Sort rows of integers in registers, in descending order: a bitonic network from stage FIRST.

    The last stage alone, LOG_P, sorts rows that descend and then ascend.
    """
    # As tl.sort, but partners come from a sum: its xor takes minutes in the interpreter.
    cube = tl.reshape(x_BP, [2] * (LOG_B + LOG_P))
    for stage in tl.static_range(FIRST, LOG_P + 1):
        for step in tl.static_range(stage):
            cube = _swap(cube, stage - 1 - step, stage, LOG_B + LOG_P, LOG_P)
    return tl.reshape(cube, x_BP.shape)


@triton.jit
def _logits_of(keys, DTYPE: tl.constexpr):
    """Return the logits of keys, in float32: the inverse of `_keys`."""
    if DTYPE == tl.float32:  # noqa: SIM300
        ordered = (keys >> 32).to(tl.int32)
        return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        ordered = keys >> 16
        bits = (ordered ^ ((ordered >> 31) & 0x7FFF)).to(tl.int16)
        return bits.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _row_sum(x_BN):
    """Sum rows by adding their halves repeatedly, as torch does on CUDA, to shape (B, 1)."""
    # Sums of two numbers only, so no backend can change the order.
    for _ in tl.static_range(5):
        if x_BN.shape[1] > 1:
            x_BN = tl.sum(tl.reshape(x_BN, [x_BN.shape[0], 2, x_BN.shape[1] // 2]), axis=1)
    return x_BN


@triton.jit
def _softmax_sum(row_B1, max_B1, E: tl.constexpr, P: tl.constexpr, LIBDEVICE: tl.constexpr):
    """Sum exp(logit - max) in the order of torch's softmax: by strided lanes, then by halves."""
    LANES: tl.constexpr = P if P < 32 else 32
    lane_L = tl.arange(0, LANES)[None, :]
    sum_BL = tl.zeros([max_B1.shape[0], LANES], tl.float32)
    for step in tl.static_range(P // LANES):
        expert_L = step * LANES + lane_L
        logits_BL = tl.load(row_B1 + expert_L, mask=expert_L < E, other=-float("inf"))
        sum_BL += _exp(logits_BL.to(tl.float32) - max_B1, LIBDEVICE)
    return _row_sum(sum_BL)


@triton.jit
def _divide(x_BN, by_B1):
    """Divide rows with correct rounding; `/` is an approximation."""
    return tl.div_rn(x_BN, tl.broadcast_to(by_B1, x_BN.shape))


@triton.jit
def _median(sorted_BP, place_P, E: tl.constexpr):
    """Return the median of rows sorted in either direction, shape (B, 1)."""
    is_middle_P = (place_P == E // 2) | (place_P == (E - 1) // 2)
    # All other summands are zeros, so the sum rounds at most once.
    middle_B1 = tl.sum(tl.where(is_middle_P, sorted_BP, 0.0), axis=1, keep_dims=True)
    return middle_B1 * (0.5 if E % 2 == 0 else 1.0)


@triton.jit
def _scores(
    sorted_BP, place_P,
    E: tl.constexpr, LOG_B: tl.constexpr, LOG_P: tl.constexpr, STUDENTIZED: tl.constexpr,
):  # fmt: skip
    """Return the score of each rank: logit - median, divided by the robust scale if studentized."""
    scores_BP = sorted_BP - _median(sorted_BP, place_P, E)
    if STUDENTIZED:
        # Deviations of sorted logits descend, then ascend; padding is set to the largest value.
        # The bits of non-negative floats are ordered as the floats.
        P: tl.constexpr = 1 << LOG_P
        bits_BP = tl.abs(scores_BP).to(tl.int32, bitcast=True)
        bits_BP = tl.where(place_P < E, bits_BP, 2147483647)
        bits_BP = _sort_descending(bits_BP, LOG_B, LOG_P, FIRST=LOG_P)
        mad_B1 = _median(bits_BP.to(tl.float32, bitcast=True), place_P - (P - E), E)
        scale_B1 = mad_B1 * 1.4826
        if tl.min((mad_B1 > 0).to(tl.int32)) == 0:  # most logits of some row are equal
            deviations_BP = tl.where(place_P < E, tl.abs(scores_BP), 0.0)
            # float64: rounded once, in any order of summation.
            sum_B1 = tl.sum(deviations_BP.to(tl.float64), axis=1, keep_dims=True)
            mean_B1 = (sum_B1 / E).to(tl.float32)
            scale_B1 = tl.where(mad_B1 > 0, scale_B1, mean_B1 * 1.2533141373155001)
        scale_B1 = tl.maximum(scale_B1, 1.1754943508222875e-38)
        scores_BP = _divide(scores_BP, scale_B1)
    return scores_BP


@triton.jit
def _keep_by_contribution(
    weights_BC, expert_BC, slot_C, lines_ptr, scale_ptr, min_k, K: tl.constexpr, STEP: tl.constexpr
):
    """Drop slots with a small weight x scale, by step-up over ranks or by one threshold."""
    is_slot_C = slot_C < K
    scale_BC = tl.load(scale_ptr + expert_BC, mask=is_slot_C, other=0.0)
    scores_BC = tl.where(is_slot_C, weights_BC * scale_BC, -float("inf"))
    other_B1C, own_BC1 = tl.expand_dims(scores_BC, 1), tl.expand_dims(scores_BC, 2)
    is_before_1CC = tl.expand_dims(slot_C, 1) < tl.expand_dims(slot_C, 2)
    is_better_BCC = (other_B1C > own_BC1) | ((other_B1C == own_BC1) & is_before_1CC)
    rank_BC = tl.sum(is_better_BCC.to(tl.int32), axis=2)
    if STEP:
        lines_BC = tl.load(lines_ptr + K - 1 - rank_BC, mask=is_slot_C, other=float("inf"))
        dropped_BC = tl.where(is_slot_C & (-scores_BC >= lines_BC), K - rank_BC, 0)
        return rank_BC < tl.maximum(K - tl.max(dropped_BC, axis=1, keep_dims=True), min_k)
    else:
        return (scores_BC > tl.load(lines_ptr)) | (rank_BC < min_k)


@triton.jit
def _keep_by_mass(weights_BC, slot_C, share_ptr, min_k, DECISION: tl.constexpr):
    """Keep slots by their fraction of the token's mass, or of its largest weight."""
    # float64: the sum of earlier slots must not depend on the number of later ones.
    weights_BC = weights_BC.to(tl.float64)
    share = tl.load(share_ptr)
    if DECISION == "top_p":
        is_before_1CC = tl.expand_dims(slot_C, 1) < tl.expand_dims(slot_C, 2)
        before_BC = tl.sum(tl.where(is_before_1CC, tl.expand_dims(weights_BC, 1), 0.0), axis=2)
        mass_B1 = tl.sum(weights_BC, axis=1, keep_dims=True)
        return (before_BC < share * mass_B1) | (slot_C < min_k)
    elif DECISION == "min_fraction":
        is_large_BC = weights_BC >= share * tl.sum(weights_BC, axis=1, keep_dims=True)
        return is_large_BC | (weights_BC == tl.max(weights_BC, axis=1, keep_dims=True))
    else:
        # Weights descend with the slot.
        is_large_BC = weights_BC >= share * tl.max(weights_BC, axis=1, keep_dims=True)
        return is_large_BC | (slot_C < min_k)


@triton.jit
def _mix(
    weights_BC, keep_BC, logits_BC, slot_C, model_k, temperature,
    NORMALISES: tl.constexpr, CONVENTION: tl.constexpr, TEMPERED: tl.constexpr,
    LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """Return the weights of the kept slots, as defined by `rules.router.Weighing`."""
    kept_BC = tl.where(keep_BC, weights_BC, 0.0)
    sum_B1 = tl.maximum(_row_sum(kept_BC), 1e-30)
    if CONVENTION == "renormalize":
        kept_BC = _divide(kept_BC, sum_B1)
    elif NORMALISES or CONVENTION == "preserve_mass":
        own_BC = weights_BC if NORMALISES else tl.where(slot_C < model_k, weights_BC, 0.0)
        kept_BC *= _divide(tl.maximum(_row_sum(own_BC), 1e-30), sum_B1)
    if TEMPERED:
        tempered_BC = tl.where(keep_BC, tl.div_rn(logits_BC, temperature), -float("inf"))
        fraction_BC = _exp(tempered_BC - tl.max(tempered_BC, axis=1, keep_dims=True), LIBDEVICE)
        kept_BC = _divide(fraction_BC, _row_sum(fraction_BC)) * _row_sum(kept_BC)
    return kept_BC


@triton.jit
def _keep_by_count(
    sorted_BP, place_P, slot_C, lines_P, min_k, max_k, empty_k,
    E: tl.constexpr, LOG_B: tl.constexpr, LOG_P: tl.constexpr, STUDENTIZED: tl.constexpr,
):  # fmt: skip
    """Keep the best slots up to the last rank whose score reaches its critical value, limited."""
    scores_BP = _scores(sorted_BP, place_P, E, LOG_B, LOG_P, STUDENTIZED)
    is_reached_BP = (scores_BP >= lines_P) & (place_P < E)
    count_B1 = tl.max(tl.where(is_reached_BP, place_P + 1, 0), axis=1, keep_dims=True)
    count_B1 = tl.where(count_B1 == 0, empty_k, count_B1)
    return slot_C < tl.minimum(tl.maximum(count_B1, min_k), max_k)


@triton.jit
def _slot_weights(
    row_B1, logits_BP, top_logits_BC, slot_C, DTYPE: tl.constexpr,
    E: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
    NORMALISES: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """Return the family's own slot weights, rounded to its dtype: the rule's input."""
    max_B1 = tl.max(logits_BP.to(tl.float32), axis=1, keep_dims=True)
    sum_B1 = _softmax_sum(row_B1, max_B1, E, P, LIBDEVICE)
    weights_BC = _exp(top_logits_BC - max_B1, LIBDEVICE)
    weights_BC = tl.where(slot_C < K, _divide(weights_BC, sum_B1), 0.0)
    if NORMALISES:
        weights_BC = _divide(weights_BC, _row_sum(weights_BC))
    return weights_BC.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "min_k", "max_k", "empty_k", "model_k"])
def _route(
    logits_ptr, is_real_ptr, index_ptr, weights_ptr, keep_ptr, lines_ptr, scale_ptr,
    num_tokens, min_k, max_k, empty_k, model_k, temperature,
    E: tl.constexpr, K: tl.constexpr, C: tl.constexpr, LOG_P: tl.constexpr, LOG_B: tl.constexpr,
    DECISION: tl.constexpr, STUDENTIZED: tl.constexpr, NORMALISES: tl.constexpr,
    CONVENTION: tl.constexpr, TEMPERED: tl.constexpr, LIBDEVICE: tl.constexpr,
    HAS_PADS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Route a block of tokens; those that aren't real keep nothing.

    By hand, 4 experts, 2 slots: logits (0, 3, 1, -1) have the median 0.5 and the sorted scores 2.5,
    0.5, -0.5, -1.5. Of the critical values (2, 1, 0, -1) only rank 1's is reached: expert 1 stays,
    and the second slot, expert 2, becomes expert 1 with weight 0. The count is 1.
    """
    B: tl.constexpr = 1 << LOG_B
    P: tl.constexpr = 1 << LOG_P
    place_P, slot_C = tl.arange(0, P)[None, :], tl.arange(0, C)[None, :]
    if DECISION == "step_up":
        lines_P = tl.load(lines_ptr + place_P, mask=place_P < E, other=float("inf"))
    let_next_start(OVERLAPS)
    wait_for_previous(OVERLAPS)
    token_B1 = (tl.program_id(0) * B + tl.arange(0, B))[:, None]
    # Surplus rows of the last program read the last token again, but don't write.
    row_B1 = logits_ptr + tl.minimum(token_B1, num_tokens - 1).to(tl.int64) * E
    logits_BP = tl.load(row_B1 + place_P, mask=place_P < E, other=-float("inf"))
    keys_BP = _sort_descending(_keys(logits_BP, place_P, E, P), LOG_B, LOG_P)
    # The first C of P elements: all others are zeros in the sum.
    is_first = tl.arange(0, P // C)[None, :, None] == 0
    keys_BC = tl.sum(tl.where(is_first, tl.reshape(keys_BP, [B, P // C, C]), 0), axis=1)
    # NaN may sort anywhere, but the index stays valid.
    expert_BC = tl.minimum(P - 1 - (keys_BC & (P - 1)).to(tl.int32), E - 1)
    top_logits_BC = _logits_of(keys_BC, logits_BP.dtype)
    weights_BC = _slot_weights(
        row_B1, logits_BP, top_logits_BC, slot_C, weights_ptr.dtype.element_ty,
        E, P, K, NORMALISES, LIBDEVICE,
    )  # fmt: skip

    if DECISION == "count":
        keep_BC = tl.broadcast_to(slot_C < max_k, [B, C])
    elif DECISION == "step_up":
        sorted_BP = _logits_of(keys_BP, logits_BP.dtype)
        keep_BC = _keep_by_count(
            sorted_BP, place_P, slot_C, lines_P, min_k, max_k, empty_k,
            E, LOG_B, LOG_P, STUDENTIZED,
        )  # fmt: skip
    elif DECISION == "drop" or DECISION == "threshold":
        keep_BC = _keep_by_contribution(
            weights_BC, expert_BC, slot_C, lines_ptr, scale_ptr, min_k, K, DECISION == "drop"
        )
    else:
        keep_BC = _keep_by_mass(weights_BC, slot_C, lines_ptr, min_k, DECISION)
    keep_BC &= slot_C < K
    mixed_BC = _mix(
        weights_BC, keep_BC, top_logits_BC, slot_C, model_k, temperature,
        NORMALISES, CONVENTION, TEMPERED, LIBDEVICE,
    )  # fmt: skip
    first_B1 = tl.min(tl.where(keep_BC, slot_C, C), axis=1, keep_dims=True)
    best_B1 = tl.sum(tl.where(slot_C == first_B1, expert_BC, 0), axis=1, keep_dims=True)
    if HAS_PADS:
        keep_BC &= tl.load(is_real_ptr + tl.minimum(token_B1, num_tokens - 1)) != 0
        mixed_BC = tl.where(keep_BC, mixed_BC, 0.0)
    at_BC = token_B1.to(tl.int64) * K + slot_C
    is_there_BC = (token_B1 < num_tokens) & (slot_C < K)
    tl.store(index_ptr + at_BC, tl.where(keep_BC, expert_BC, best_B1).to(tl.int64), is_there_BC)
    tl.store(weights_ptr + at_BC, mixed_BC.to(weights_ptr.dtype.element_ty), is_there_BC)
    tl.store(keep_ptr + at_BC, keep_BC, is_there_BC)


IS_INTERPRETED: Final = not isinstance(_route, triton.JITFunction)
DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


def bind(plan: Plan, rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router:
    """Return a layer's router; logits and mask are contiguous, on the layer's device."""
    num_experts, num_slots = context.num_experts, rule.num_candidates(context.model_top_k)
    log_experts = (num_experts - 1).bit_length()
    numbers = (plan.min_k, plan.max_k, plan.empty_k, context.model_top_k, rule.temperature)
    constants = {
        "E": num_experts,
        "LOG_P": log_experts,
        "K": num_slots,
        "C": triton.next_power_of_2(num_slots),
        "DECISION": plan.decision,
        "STUDENTIZED": isinstance(plan.null, CentredNull) and plan.null.is_studentized,
        "NORMALISES": family.normalises,
        "CONVENTION": rule.weights,
        "TEMPERED": rule.temperature != 1.0,
        "LIBDEVICE": not IS_INTERPRETED,
        # A fused multiply-add rounds once, the reference implementation twice.
        "enable_fp_fusion": False,
        "OVERLAPS": not IS_INTERPRETED and runs_on_hopper(),
    }
    if constants["OVERLAPS"]:
        constants["launch_pdl"] = True

    def route(router_logits_TE: Tensor, is_real_BS: Tensor | None = None) -> RoutedSlots:
        if router_logits_TE.dtype not in DTYPES:
            raise InputError(
                f"router logits must be one of {DTYPES}, got {router_logits_TE.dtype}; load the "
                "model in one of these"
            )
        num_tokens, device = len(router_logits_TE), router_logits_TE.device
        shape = (num_tokens, num_slots)
        weights_dtype = family.weights_dtype or router_logits_TE.dtype
        slots = RoutedSlots(
            torch.empty(shape, dtype=torch.int64, device=device),
            torch.empty(shape, dtype=weights_dtype, device=device),
            torch.empty(shape, dtype=torch.bool, device=device),
        )
        if num_tokens:
            log_tokens, num_warps = _tile(num_tokens, log_experts)
            # Triton launches on the current device, which may differ from the layer's.
            with torch.cuda.device_of(router_logits_TE):
                _route[(-(-num_tokens >> log_tokens),)](
                    router_logits_TE.contiguous(), is_real_BS, *slots, plan.lines, plan.scale_E,
                    num_tokens, *numbers, LOG_B=log_tokens, HAS_PADS=is_real_BS is not None,
                    num_warps=num_warps, **constants,
                )  # fmt: skip
        return slots

    return route


def _tile(num_tokens: int, log_experts: int) -> tuple[int, int]:
    """Choose log2 of the tokens per program, and its warps; measured on an H100."""
    if IS_INTERPRETED:  # its cost is per operation, not per element
        return 5, 1
    if num_tokens < 2_048:
        return 0, max(1, 2**log_experts // 128)
    return max(0, 10 - log_experts), 4
