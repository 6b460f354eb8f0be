"""The fused router: a rule's plan, its reference implementation, and the choice of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from importlib import import_module
from importlib.util import find_spec
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bh_routing.nulls.catalog import get_null
from bh_routing.nulls.centred import MAD_TO_SIGMA, median_of_sorted, studentize
from bh_routing.nulls.cut_offs import cut_offs
from bh_routing.rules.base import Candidates, LayerContext, Rows, Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.contribution import ContributionThreshold, layer_scale
from bh_routing.rules.drop import BenjaminiHochbergDrop
from bh_routing.rules.fixed import PerLayerTopK, TopK
from bh_routing.rules.mass import MinP, TopP
from bh_routing.rules.weights import alias_dropped, kept_weights, tempered

Decision = Literal["count", "step_up", "drop", "threshold", "top_p", "min_p"]
"""Kept slots. count: max_k. step_up: up to the last rank whose score reaches its critical value.
drop: all but the smallest contributions, up to the last rank below its critical value. threshold:
contributions above a threshold. top_p, min_p: as in the rules."""

_STUDENTIZED: Final = {
    "background": False,
    "pooled": False,
    "permutation": False,
    "gaussian": True,
    "background_studentized": True,
}
"""Nulls with a fused score -> whether it is divided by the token's robust scale."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RouterPlan:
    """One layer's decision as parameters of a kernel, on the layer's device."""

    decision: Decision
    num_slots: int
    """Slots that the router proposes, K."""
    min_k: int = 1
    max_k: int = 1
    empty_k: int = 0
    """Replaces a count of 0, before limits apply."""
    is_studentized: bool = False
    """Whether scores are divided by the token's robust scale."""
    lines: Tensor | None = None
    """Critical values by rank, float32 (E,) for step_up and (K,) for drop; the threshold, float32
    (1,); the fraction, float64 (1,), for top_p and min_p."""
    scale_E: Tensor | None = None
    """float32: a slot's contribution is its weight times the expert's scale."""


@singledispatch
def plan_of(rule: Rule, context: LayerContext) -> RouterPlan | None:
    """Return the plan of a rule; None if the rule has no fused form.

    Raises:
        CalibrationError: the context lacks a reference that the rule needs.
    """
    return None


@plan_of.register
def _top_k(rule: TopK, context: LayerContext) -> RouterPlan | None:
    return _count_plan(rule, context, rule.k)


@plan_of.register
def _per_layer_top_k(rule: PerLayerTopK, context: LayerContext) -> RouterPlan | None:
    rule.bind(context)  # raises if the list doesn't fit the layers
    return _count_plan(rule, context, rule.k[context.layer])


def _count_plan(rule: Rule, context: LayerContext, k: int) -> RouterPlan:
    num_slots = rule.num_candidates(context.model_top_k)
    return RouterPlan(decision="count", num_slots=num_slots, max_k=k)


@plan_of.register
def _benjamini_hochberg(rule: BenjaminiHochberg, context: LayerContext) -> RouterPlan | None:
    # Storey's critical values depend on the token, and the softmax null isn't worth a kernel.
    if rule.procedure == "storey" or rule.null not in _STUDENTIZED:
        return None
    null, num_experts = get_null(rule.null), context.num_experts
    lines_E = cut_offs(null, rule.alpha, num_experts, context.table, rule.procedure)
    return RouterPlan(
        decision="step_up",
        num_slots=rule.num_candidates(context.model_top_k),
        min_k=rule.min_k,
        max_k=rule.most_kept(context.model_top_k),
        empty_k=rule.count_kept(0, context.model_top_k),
        is_studentized=_STUDENTIZED[rule.null],
        lines=lines_E.to(context.device),
    )


@plan_of.register
def _benjamini_hochberg_drop(
    rule: BenjaminiHochbergDrop, context: LayerContext
) -> RouterPlan | None:
    if rule.unit != "token":
        return None
    if rule.scope == "population":
        return _threshold_plan(rule, context, rule.cut_off(context))
    return RouterPlan(
        decision="drop",
        num_slots=context.model_top_k,
        min_k=rule.min_k,
        lines=rule.cut_offs(context),
        scale_E=layer_scale(rule.method, rule.statistic, context),
    )


@plan_of.register
def _contribution_threshold(
    rule: ContributionThreshold, context: LayerContext
) -> RouterPlan | None:
    # A subclass may decide whole steps.
    return None if rule.unit != "token" else _threshold_plan(rule, context, rule.threshold)


def _threshold_plan(
    rule: BenjaminiHochbergDrop | ContributionThreshold, context: LayerContext, threshold: float
) -> RouterPlan:
    return RouterPlan(
        decision="threshold",
        num_slots=context.model_top_k,
        min_k=rule.min_k,
        lines=torch.tensor([threshold], device=context.device),
        scale_E=layer_scale(rule.method, rule.statistic, context),
    )


@plan_of.register
def _top_p(rule: TopP, context: LayerContext) -> RouterPlan | None:
    return _fraction_plan("top_p", rule.p, context)


@plan_of.register
def _min_p(rule: MinP, context: LayerContext) -> RouterPlan | None:
    return _fraction_plan("min_p", rule.share, context)


def _fraction_plan(decision: Decision, share: float, context: LayerContext) -> RouterPlan:
    lines = torch.tensor([share], dtype=torch.float64, device=context.device)
    return RouterPlan(decision=decision, num_slots=context.model_top_k, lines=lines)


class RoutedSlots(NamedTuple):
    """Decided and weighted slots of T tokens in one layer, in descending order of logit."""

    top_k_index_TK: Tensor
    """int64; dropped slots hold the expert of the token's best kept slot."""
    top_k_weights_TK: Tensor
    """In the family's dtype; exactly 0 where dropped."""
    keep_TK: Tensor
    """bool."""
    expert_counts_T: Tensor
    """int32: number of kept slots."""


Router = Callable[[Tensor], RoutedSlots]
"""Router logits (T, E), as returned by the family's linear layer -> slots; no host sync."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxFamily:
    """A router with a float32 softmax over all experts, followed by the k largest weights."""

    normalises: bool
    """Whether the k weights are divided by their sum."""
    weights_dtype: torch.dtype | None = None
    """Final dtype of the weights; None for that of the logits."""

    def propose(self, router_logits_TE: Tensor, num_slots: int) -> Candidates:
        """Propose the slots with the largest logits; ties go to the smaller expert index.

        `torch.topk` breaks ties in any order, so its result may differ among equal logits.
        """
        logits_TE = router_logits_TE.float()
        order_TE = logits_TE.argsort(dim=-1, descending=True, stable=True)
        index_TK = order_TE[:, :num_slots]
        weights_TK = router_logits_TE.softmax(dim=-1, dtype=torch.float32).gather(-1, index_TK)
        if self.normalises:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        dtype = self.weights_dtype or router_logits_TE.dtype
        return Candidates(logits_TE, index_TK, weights_TK.to(dtype))


def reference_router(rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router:
    """Bind a rule to a layer: the reference implementation in torch, for any device.

    It supports all rules that don't need expert outputs. Each row of logits is a separate sequence,
    as in a decode step.

    Raises:
        InputError: the rule doesn't fit the layer, or lacks a calibration.
    """
    select = rule.bind(context)
    num_slots = rule.num_candidates(context.model_top_k)

    def route(router_logits_TE: Tensor) -> RoutedSlots:
        candidates = family.propose(router_logits_TE, num_slots)
        if rule.unit != "token":
            rows = Rows.of_step(len(router_logits_TE), router_logits_TE.device)
            candidates = candidates._replace(rows=rows)
        keep_TK = select(candidates)
        weights_TK = kept_weights(
            candidates.top_k_weights_TK,
            keep_TK,
            convention=rule.weights,
            normalises=family.normalises,
            temperature=rule.temperature,
            router_logits_TE=candidates.router_logits_TE,
            top_k_index_TK=candidates.top_k_index_TK,
            model_top_k=context.model_top_k,
            temperature_weights=rule.temperature_weights,
        )
        index_TK, weights_TK = alias_dropped(candidates.top_k_index_TK, weights_TK, keep_TK)
        return RoutedSlots(index_TK, weights_TK, keep_TK, keep_TK.sum(-1, dtype=torch.int32))

    return route


_SIGMA: Final = np.float32(MAD_TO_SIGMA)
_TINY: Final = np.finfo(np.float32).tiny


def sorted_router(rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router | None:
    """Bind a rule to a layer in few torch operations; None if it isn't supported.

    Supported are plans that are a count or a step-up, with the model's own weights or its mass
    redistributed at another temperature. Decisions equal the reference implementation's; weights
    agree up to rounding.

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
            # In place: the sort's result isn't shared.
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
    """Return the last rank on its critical value, bit for bit as torch; None if the MAD is 0."""
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


MAX_EXPERTS: Final = 512
MAX_SLOTS: Final = 32


def fused_router(rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router | None:
    """Bind a rule to a layer as one kernel; None if it isn't supported.

    Not supported are other devices than CUDA, machines without Triton, more than 512 experts or 32
    slots, temperature weights "raw" in a family that doesn't normalise, and rules without a plan.
    Kept slots, experts and counts equal those of `reference_router` bit for bit.

    Args:
        rule: decides which slots stay.
        context: the layer; its device is that of the logits.
        family: defines the model's own weights.
    Returns:
        A function of contiguous logits, bfloat16, float16 or float32, or None.
    Raises:
        InputError: the rule doesn't fit the layer, or lacks a calibration.
    """
    rule.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
    num_slots = rule.num_candidates(context.model_top_k)
    if context.num_experts > MAX_EXPERTS or num_slots > min(MAX_SLOTS, context.num_experts):
        return None
    is_raw = rule.temperature != 1.0 and rule.temperature_weights == "raw"
    if is_raw and not family.normalises:
        return None
    if context.device.type == "meta" or find_spec("triton") is None:
        return None
    # Triton is slow to import and optional.
    kernel = import_module("bh_routing.kernels.router_kernel")
    if context.device.type != ("cpu" if kernel.IS_INTERPRETED else "cuda"):
        return None
    plan = plan_of(rule, context)
    if plan is None:
        return None
    bound: Router = kernel.bind(plan, rule, context, family)
    return bound
