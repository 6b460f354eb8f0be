"""The router in one launch: softmax, top-k, the rule, weights, aliases and counts.

    family = SoftmaxFamily(normalises=False)                    # OLMoE
    route = fused_router(rule, context, family) or twin_router(rule, context, family)
    slots = route(router_logits)

The plain operations of a rule cost more than the experts it saves, so on CUDA they are one kernel.
Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Final

from bh_routing.kernels.router_plan import plan_of
from bh_routing.kernels.router_twin import Router, SoftmaxFamily
from bh_routing.rules.base import LayerContext, Rule

MAX_EXPERTS: Final = 512
MAX_SLOTS: Final = 32


def fused_router(rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router | None:
    """Bind a rule to a layer as one kernel; None where only its twin serves.

    That is: off CUDA, without Triton, more than 512 experts or 32 slots, temperature weights "raw"
    in a family that doesn't normalise, and rules that `plan_of` doesn't know. The slots kept, their
    experts and the counts are those of `twin_router` bit for bit.

    Args:
        rule: which slots stay.
        context: the layer; its device is where the logits will be.
        family: how the model's own router makes weights.
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
    # Triton takes a while to import, and isn't there on every machine.
    kernel = import_module("bh_routing.kernels.router_kernel")
    if context.device.type != ("cpu" if kernel.IS_INTERPRETED else "cuda"):
        return None
    plan = plan_of(rule, context)
    if plan is None:
        return None
    bound: Router = kernel.bind(plan, rule, context, family)
    return bound
