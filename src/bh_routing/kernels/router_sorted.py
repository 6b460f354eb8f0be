"""The router where one sort is all it takes: rules that keep a number of a token's best slots.

Its twin binds any rule, through the rule's own selector, which knows nothing of the order in which
slots come. Here they come sorted, from the sort that the rule needs anyway: on a CPU a third of the
operations.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bh_routing.kernels.router_plan import RouterPlan, plan_of
from bh_routing.kernels.router_twin import RoutedSlots, Router, SoftmaxFamily
from bh_routing.nulls.centred import median_of_sorted, studentize
from bh_routing.rules.base import LayerContext, Rule


def sorted_router(rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router | None:
    """Bind a rule to a layer in few torch operations; None where only the twin serves.

    That is: rules whose plan is neither a count nor a step-up, a temperature, and weights other
    than the model's own. Decides as the twin does; weights agree up to rounding.

    Raises:
        InputError: the rule doesn't fit the layer, or lacks a calibration.
    """
    rule.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
    if rule.temperature != 1.0 or rule.weights != "model":
        return None
    plan = plan_of(rule, context)
    if plan is None or plan.decision not in ("count", "step_up"):
        return None
    return _bind(plan, context, family)


def _bind(plan: RouterPlan, context: LayerContext, family: SoftmaxFamily) -> Router:
    num_slots, num_experts = plan.num_slots, context.num_experts
    counts = [plan.empty_k, *range(1, num_experts + 1)]
    counts = [min(max(count, plan.min_k), plan.max_k) for count in counts]
    count_by_rank = torch.tensor(counts, dtype=torch.int32, device=context.device)
    rank_E = torch.arange(1, num_experts + 1, device=context.device)
    slot_K = torch.arange(num_slots, dtype=torch.int32, device=context.device)
    keeps_all = plan.decision == "count" and plan.max_k >= num_slots

    def count_kept(sorted_TE: Tensor) -> Tensor:
        if plan.lines is None:
            return sorted_TE.new_full((len(sorted_TE), 1), plan.max_k, dtype=torch.int32)
        if plan.is_studentized:
            scores_TE = studentize(sorted_TE, sorted_TE)
        else:
            scores_TE = sorted_TE - median_of_sorted(sorted_TE)
        last_T1 = ((scores_TE >= plan.lines) * rank_E).amax(-1, keepdim=True)
        return count_by_rank.take(last_T1)

    def route(router_logits_TE: Tensor) -> RoutedSlots:
        sorted_TE, order_TE = router_logits_TE.float().sort(dim=-1, descending=True, stable=True)
        index_TK = order_TE[:, :num_slots]
        weights_TK = sorted_TE.softmax(-1)[:, :num_slots]
        if family.normalises:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK.to(family.weights_dtype or router_logits_TE.dtype)
        counts_T1 = count_kept(sorted_TE)
        keep_TK = slot_K < counts_T1
        if not keeps_all:
            index_TK = torch.where(keep_TK, index_TK, index_TK[:, :1])
            weights_TK = _drop(weights_TK, keep_TK, family.normalises)
        return RoutedSlots(index_TK, weights_TK, keep_TK, counts_T1.squeeze(-1))

    return route


def _drop(weights_TK: Tensor, keep_TK: Tensor, normalises: bool) -> Tensor:
    if not normalises:
        return weights_TK * keep_TK
    all_TK = weights_TK.float()
    kept_TK = all_TK * keep_TK
    ratio_T1 = all_TK.sum(-1, keepdim=True) / kept_TK.sum(-1, keepdim=True)
    return (kept_TK * ratio_T1).to(weights_TK.dtype)
