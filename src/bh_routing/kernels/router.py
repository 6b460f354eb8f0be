"""Fused routers: a rule's plan as one kernel, and a plan on decode steps as three.

Axes: B tokens of a step, E experts, N reference scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.nulls.centred import CentredNull
from bh_routing.nulls.contributions import NEEDED_STEPS, STEP_SIZES
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.contribution import layer_scale, require_contributions
from bh_routing.rules.drop import BenjaminiHochbergDrop
from bh_routing.rules.router import Router, SoftmaxFamily
from bh_routing.rules.step import ExpertBudget, FisherMass, OpportunisticActivation

MAX_EXPERTS: Final = 512
MAX_SLOTS: Final = 32


def fused_router(rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router | None:
    """Bind a rule to a layer as one kernel; None if it isn't supported.

    Not supported are other devices than CUDA, machines without Triton, more than 512 experts or 32
    slots, temperature weights "raw" in a family that doesn't normalise, rules without a plan, and
    plans with Storey's critical values or with scores other than centred logits. Kept slots,
    experts and counts equal those of `rules.router.reference_router` bit for bit. Logits are
    contiguous, bfloat16, float16 or float32.

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
    plan = rule.plan(context)
    if plan is None or plan.storey is not None:
        return None
    if plan.null is not None and not isinstance(plan.null, CentredNull):
        return None
    bound: Router = kernel.bind(plan, rule, context, family)
    return bound


class StepPlan(NamedTuple):
    """One layer's decision on a step as parameters of kernels, on the layer's device.

    Read are experts above a cut-off, those within a budget, or those that BH doesn't drop.
    """

    scale_E: Tensor
    """float32: a slot's score is its weight times the expert's scale."""
    min_k: int
    """Slots with the largest scores whose experts are read in any case."""
    cut_off_B: Tensor | None = None
    """float64, by number of tokens: experts with a larger norm of the scores are read."""
    budget: int | None = None
    """Number of experts with the largest norm that are read."""
    alpha: float = 0.0
    """Level of BH over the experts of a step."""
    tables: tuple[Tensor, ...] = ()
    """Ascending float32 scores of needed experts (N,), for 1 token and for each of STEP_SIZES."""
    is_squared: bool = True
    """Whether the norm is the root of summed squares, or a sum."""


@singledispatch
def step_plan_of(rule: Any, context: LayerContext) -> StepPlan | None:
    """Return the plan of a rule; None if the rule has no fused form.

    Raises:
        CalibrationError: the context lacks a reference that the rule needs.
    """
    return None


@step_plan_of.register
def _fisher_mass(rule: FisherMass, context: LayerContext) -> StepPlan | None:
    if rule.exponent != 2:
        return None
    # float32: compared with float32, a Python number is rounded to it.
    return _cut_off_plan(rule, context, torch.full((STEP_SIZES[-1] + 1,), rule.threshold).double())


@step_plan_of.register
def _benjamini_hochberg_drop(rule: BenjaminiHochbergDrop, context: LayerContext) -> StepPlan | None:
    if rule.unit != "step":
        return None
    if rule.scope == "step_population":
        return _cut_off_plan(rule, context, rule.step_cut_offs(context))
    contributions = require_contributions(rule.method, context)
    one = contributions.needed(rule.statistic, rule.needed).sorted_scores_N
    scale_E = layer_scale(rule.method, rule.statistic, context)
    tables = (one, *contributions.step_tables(NEEDED_STEPS))
    return StepPlan(scale_E, rule.min_k, alpha=rule.alpha, tables=tables)


def _cut_off_plan(
    rule: FisherMass | BenjaminiHochbergDrop, context: LayerContext, cut_off_B: Tensor
) -> StepPlan:
    scale_E = layer_scale(rule.method, rule.statistic, context)
    return StepPlan(scale_E, rule.min_k, cut_off_B.to(context.device))


@step_plan_of.register
def _opportunistic(rule: OpportunisticActivation, context: LayerContext) -> StepPlan | None:
    return StepPlan(torch.ones(context.num_experts, device=context.device), rule.k0, budget=0)


@step_plan_of.register
def _expert_budget(rule: ExpertBudget, context: LayerContext) -> StepPlan | None:
    if rule.by == "gate_mass":
        scale_E = torch.ones(context.num_experts, device=context.device)
        return StepPlan(scale_E, rule.min_k, budget=rule.budget, is_squared=False)
    scale_E = layer_scale(rule.method, rule.statistic, context)
    return StepPlan(scale_E, rule.min_k, budget=rule.budget)


ServedStep = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(router logits (T, E), kinds (T,), expert ids (T, K) to fill) -> weights (T, K).

Kinds are int64: 1 for a token that decodes in the step, 2 for a prompt's token, which keeps the
model's own slots, 0 for padding, which takes an expert that is read anyway. Dropped slots have
weight 0. A token whose logits are NaN doesn't vote. There are up to 64 tokens."""


def fused_step_router(rule: Any, context: LayerContext, family: SoftmaxFamily) -> Router | None:
    """Bind a rule on decode steps to a layer as three kernels; None if it isn't supported.

    In a step, kept slots, experts and counts equal those of `reference_router` bit for bit. Not
    supported are other devices than CUDA, machines without Triton, rules without a plan, refilled
    slots in a family that normalises, and temperature weights "raw" in one that doesn't.

    Raises:
        CalibrationError: the context lacks a reference that the rule needs.
    """
    kernel, plan = _step_kernel_of(rule, context, family)
    return None if plan is None else kernel.bind(plan, rule, context, family)


def served_step_router(
    rule: Any, context: LayerContext, family: SoftmaxFamily
) -> ServedStep | None:
    """Bind as `fused_step_router` does, for steps that share a forward pass with prompts."""
    kernel, plan = _step_kernel_of(rule, context, family)
    return None if plan is None else kernel.bind_served(plan, rule, context, family)


def _step_kernel_of(
    rule: Any, context: LayerContext, family: SoftmaxFamily
) -> tuple[Any, StepPlan | None]:
    num_slots = rule.num_candidates(context.model_top_k)
    if find_spec("triton") is None or context.num_experts > MAX_EXPERTS or num_slots > MAX_SLOTS:
        return None, None
    kernel = import_module("bh_routing.kernels.router_step_kernel")
    if context.device.type != ("cpu" if kernel.IS_INTERPRETED else "cuda"):
        return None, None
    is_raw = rule.temperature != 1.0 and rule.temperature_weights == "raw"
    if (family.normalises and num_slots > context.model_top_k) or (
        is_raw and not family.normalises
    ):
        return None, None
    return kernel, step_plan_of(rule, context)
