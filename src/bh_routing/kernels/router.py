"""The fused router: a rule's plan as one kernel, where a kernel supports it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Final

from bh_routing.nulls.centred import CentredNull
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.router import Router, SoftmaxFamily

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
