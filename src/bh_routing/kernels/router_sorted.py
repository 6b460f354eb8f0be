"""The router where one sort is all it takes: rules that keep a number of a token's best slots.

Its twin binds any rule, through the rule's own selector, which knows nothing of the order in which
slots come. Here they come sorted, from the sort that the rule needs anyway: on a CPU a third of the
operations. There one token's rank is found in numpy, whose calls cost a fraction of torch's.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bh_routing.kernels.router_plan import RouterPlan, plan_of
from bh_routing.kernels.router_twin import RoutedSlots, Router, SoftmaxFamily
from bh_routing.nulls.centred import MAD_TO_SIGMA, median_of_sorted, studentize
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.weights import tempered

_SIGMA: Final = np.float32(MAD_TO_SIGMA)
_TINY: Final = np.finfo(np.float32).tiny


def sorted_router(rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router | None:
    """Bind a rule to a layer in few torch operations; None where only the twin serves.

    That is: rules whose plan is neither a count nor a step-up, and weights other than the model's
    own, or than its mass shared out at another temperature. Decides as the twin does; weights agree
    up to rounding.

    Raises:
        InputError: the rule doesn't fit the layer, or lacks a calibration.
    """
    rule.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
    is_raw = rule.temperature != 1.0 and rule.temperature_weights == "raw"
    if is_raw or rule.weights != "model":
        return None
    plan = plan_of(rule, context)
    if plan is None or plan.decision not in ("count", "step_up"):
        return None
    return _bind(plan, context, family, rule.temperature)


def _bind(
    plan: RouterPlan, context: LayerContext, family: SoftmaxFamily, temperature: float
) -> Router:
    num_slots, num_experts = plan.num_slots, context.num_experts
    counts = [plan.empty_k, *range(1, num_experts + 1)]
    counts = [min(max(count, plan.min_k), plan.max_k) for count in counts]
    count_by_rank = torch.tensor(counts, dtype=torch.int32, device=context.device)
    rank_E = torch.arange(1, num_experts + 1, device=context.device)
    slot_K = torch.arange(num_slots, dtype=torch.int32, device=context.device)
    keep_by_rank = (slot_K < count_by_rank.unsqueeze(1)).unsqueeze(1).unbind()
    on_cpu = context.device.type == "cpu"
    lines_E = plan.lines.numpy() if on_cpu and plan.lines is not None else None
    is_tempered = temperature != 1.0
    keeps_all = plan.decision == "count" and plan.max_k >= num_slots and not is_tempered

    def count_kept(sorted_TE: Tensor) -> Tensor:
        if plan.lines is None:
            return sorted_TE.new_full((len(sorted_TE), 1), plan.max_k, dtype=torch.int32)
        if plan.is_studentized:
            scores_TE = studentize(sorted_TE, sorted_TE)
        else:
            scores_TE = sorted_TE - median_of_sorted(sorted_TE)
        last_T1 = ((scores_TE >= plan.lines) * rank_E).amax(-1, keepdim=True)
        return count_by_rank.take(last_T1)

    def weigh(weights_TK: Tensor, keep_TK: Tensor, logits_TK: Tensor) -> Tensor:
        kept_TK = _drop(weights_TK, keep_TK, family.normalises)
        if is_tempered:
            kept_TK = tempered(kept_TK, keep_TK, logits_TK, temperature).to(kept_TK.dtype)
        return kept_TK

    def alone(rank: int, index_1K: Tensor, weights_1K: Tensor, logits_1K: Tensor) -> RoutedSlots:
        keep_1K, count_1 = keep_by_rank[rank], count_by_rank[rank : rank + 1]
        if counts[rank] < num_slots:
            # In place: nobody else holds the sort's result.
            index_K = index_1K[0].numpy()
            index_K[counts[rank] :] = index_K[0]
        if counts[rank] < num_slots or is_tempered:
            weights_1K = weigh(weights_1K, keep_1K, logits_1K)
        return RoutedSlots(index_1K, weights_1K, keep_1K, count_1)

    def route(router_logits_TE: Tensor) -> RoutedSlots:
        sorted_TE, order_TE = router_logits_TE.float().sort(dim=-1, descending=True, stable=True)
        index_TK = order_TE[:, :num_slots]
        weights_TK = sorted_TE.softmax(-1)[:, :num_slots]
        if family.normalises:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK.to(family.weights_dtype or router_logits_TE.dtype)
        if lines_E is not None and len(sorted_TE) == 1:
            rank = _reached_rank(sorted_TE[0].numpy(), lines_E, plan)
            if rank is not None:
                return alone(rank, index_TK, weights_TK, sorted_TE[:, :num_slots])
        counts_T1 = count_kept(sorted_TE)
        keep_TK = slot_K < counts_T1
        if not keeps_all:
            index_TK = torch.where(keep_TK, index_TK, index_TK[:, :1])
            weights_TK = weigh(weights_TK, keep_TK, sorted_TE[:, :num_slots])
        return RoutedSlots(index_TK, weights_TK, keep_TK, counts_T1.squeeze(-1))

    return route


def _reached_rank(
    sorted_E: NDArray[np.float32], lines_E: NDArray[np.float32], plan: RouterPlan
) -> int | None:
    """Find the last rank on its line, by the numbers that torch would compare; None: ask torch."""
    middle = len(sorted_E) // 2
    scores_E = sorted_E - _median(sorted_E, middle)
    if plan.is_studentized:
        deviations_E = np.sort(np.abs(scores_E))
        mad = _median(deviations_E, middle)
        if not mad > 0:
            return None
        scores_E /= max(mad * _SIGMA, _TINY)
    reached = np.flatnonzero(scores_E >= lines_E)
    return int(reached[-1]) + 1 if len(reached) else 0


def _median(sorted_E: NDArray[np.float32], middle: int) -> np.float32:
    if len(sorted_E) % 2:
        return np.float32(sorted_E[middle])
    return np.float32((sorted_E[middle - 1] + sorted_E[middle]) / np.float32(2))


def _drop(weights_TK: Tensor, keep_TK: Tensor, normalises: bool) -> Tensor:
    if not normalises:
        return weights_TK * keep_TK
    all_TK = weights_TK.float()
    kept_TK = all_TK * keep_TK
    ratio_T1 = all_TK.sum(-1, keepdim=True) / kept_TK.sum(-1, keepdim=True)
    return (kept_TK * ratio_T1).to(weights_TK.dtype)
