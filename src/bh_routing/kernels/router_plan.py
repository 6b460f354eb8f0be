"""What a fused router needs to know of a rule: one way to decide, and the numbers it compares with.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Final, Literal

import torch
from torch import Tensor

from bh_routing.nulls.catalog import get_null
from bh_routing.nulls.cut_offs import cut_offs
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.benjamini_hochberg_drop import BenjaminiHochbergDrop
from bh_routing.rules.contribution import layer_scale
from bh_routing.rules.contribution_threshold import ContributionThreshold
from bh_routing.rules.min_p import MinP
from bh_routing.rules.per_layer_top_k import PerLayerTopK
from bh_routing.rules.top_k import TopK
from bh_routing.rules.top_p import TopP

Decision = Literal["count", "step_up", "drop", "threshold", "top_p", "min_p"]
"""count: max_k slots. step_up: as many as ranks of scores reach their line. drop: all but as many
as ranks of contributions, from the smallest, stay under their line. threshold: contributions above
a line. top_p, min_p: as the rules."""

_STUDENTIZED: Final = {
    "background": False,
    "pooled": False,
    "permutation": False,
    "gaussian": True,
    "background_studentized": True,
}
"""Nulls whose score the kernel computes -> whether it is divided by the token's robust scale."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RouterPlan:
    """One layer's decision as numbers, on the layer's device."""

    decision: Decision
    num_slots: int
    """K: slots that the router proposes."""
    min_k: int = 1
    max_k: int = 1
    empty_k: int = 0
    """What a count of 0 is taken for, before it is limited."""
    is_studentized: bool = False
    """Whether scores are divided by the token's robust scale."""
    lines: Tensor | None = None
    """float32 (E,) for step_up and (K,) for drop: what a rank must reach; float32 (1,) for
    threshold; float64 (1,), the share, for top_p and min_p."""
    scale_E: Tensor | None = None
    """float32: a slot's contribution is its weight times this."""


@singledispatch
def plan_of(rule: Rule, context: LayerContext) -> RouterPlan | None:
    """Turn a rule into a plan; None for a rule that has no fused form.

    Raises:
        CalibrationError: the rule needs what the context doesn't hold.
    """
    return None


@plan_of.register
def _top_k(rule: TopK, context: LayerContext) -> RouterPlan | None:
    return _count_plan(rule, context, rule.k)


@plan_of.register
def _per_layer_top_k(rule: PerLayerTopK, context: LayerContext) -> RouterPlan | None:
    rule.bind(context)  # refuses a list that doesn't fit the layers
    return _count_plan(rule, context, rule.k[context.layer])


def _count_plan(rule: Rule, context: LayerContext, k: int) -> RouterPlan:
    num_slots = rule.num_candidates(context.model_top_k)
    return RouterPlan(decision="count", num_slots=num_slots, max_k=k)


@plan_of.register
def _benjamini_hochberg(rule: BenjaminiHochberg, context: LayerContext) -> RouterPlan | None:
    # Storey's lines depend on the token, and softmax isn't a null worth a kernel.
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
    if rule.scope == "block":
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
    return _threshold_plan(rule, context, rule.threshold)


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
    return _share_plan("top_p", rule.p, context)


@plan_of.register
def _min_p(rule: MinP, context: LayerContext) -> RouterPlan | None:
    return _share_plan("min_p", rule.share, context)


def _share_plan(decision: Decision, share: float, context: LayerContext) -> RouterPlan:
    lines = torch.tensor([share], dtype=torch.float64, device=context.device)
    return RouterPlan(decision=decision, num_slots=context.model_top_k, lines=lines)
