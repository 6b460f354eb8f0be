"""Bind a rule with fused routers: one kernel per router that supports it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bh_routing.kernels.router import RoutedSlots, Router, SoftmaxFamily, fused_router
from bh_routing.models.routing import BoundRule, Decider, bind_rule
from bh_routing.models.sites import RouterFacts
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import LayerContext, Rule


def bind_fused(model: Any, rule: Rule, calibration: Calibration | None = None) -> BoundRule:
    """Bind a rule as `bind_rule` does, with a fused kernel for each router that supports one.

    Kept experts are the same bit for bit, except for ties of logits: the kernel prefers the smaller
    expert index, plain torch any.

    Raises:
        CalibrationError, ModelError, InputError: as `bind_rule` does.
    """
    bound = bind_rule(model, rule, calibration)
    if rule.needs_output_norms:
        return bound
    deciders = tuple(
        _decider(rule, context, site.facts)
        for site, context in zip(bound.routers.sites, bound.contexts, strict=True)
    )
    return replace(bound, deciders=deciders)


def is_plain_softmax(facts: RouterFacts) -> bool:
    """Whether a router is a softmax followed by the k largest weights, and nothing else."""
    does_more = facts.bias or facts.groups or facts.has_gains or facts.shares_with or facts.by_token
    is_scaled = facts.scale is None or abs(facts.scale - 1.0) > 1e-3
    return facts.scoring == "softmax" and not (does_more or facts.skips or is_scaled)


def _decider(rule: Rule, context: LayerContext, facts: RouterFacts) -> Decider | None:
    if not is_plain_softmax(facts):
        return None

    @cache
    def router(dtype: torch.dtype | None) -> Router | None:
        family = SoftmaxFamily(normalises=facts.normalises, weights_dtype=dtype)
        return fused_router(rule, context, family)

    if router(None) is None:
        return None

    def decide(router_logits_TE: Tensor, dtype: torch.dtype) -> RoutedSlots:
        route = router(dtype)
        assert route is not None, "whether there is a kernel doesn't depend on the dtype"
        return route(router_logits_TE)

    return decide
