"""Run a model under a rule: `route` hooks the routers, and takes every hook out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bh_routing.errors import CalibrationError, InputError, ModelError
from bh_routing.models.discovery import Routers, RouterSite, find_routers, model_fingerprint
from bh_routing.models.experts import experts_of, slot_output_norms
from bh_routing.models.trace import ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.contributions import NEEDED
from bh_routing.rules.base import Candidates, LayerContext, Rule, Selector
from bh_routing.rules.weights import alias_dropped, kept_weights

_routed: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundRule:
    """A rule made ready for one model: everything that doesn't depend on tokens is done."""

    rule: Rule
    routers: Routers
    selectors: tuple[Selector, ...]
    """One for each router, in their order."""


@contextmanager
def route(
    model: nn.Module, rule: Rule, calibration: Calibration | None = None
) -> Iterator[ExpertTrace]:
    """Run `model` under `rule` inside a `with` block; outside it nothing has changed.

    The router proposes slots, the rule decides which stay. A dropped slot gets weight 0 and the
    index of the token's own best expert, so no backend reads a dropped expert's weights.

    Args:
        model: a transformers model with mixture-of-experts layers.
        rule: which slots stay.
        calibration: reference distributions, needed by rules whose null needs a table.
    Returns:
        A context that yields the trace of what was kept.
    Raises:
        CalibrationError: the rule needs a calibration and none, or another model's, was given.
        ModelError: the model has no routers, or is already inside `route`.
        InputError: the rule doesn't fit the model, such as more experts than there are.
    Example:
        >>> with route(model, TopK(4)) as trace:                        # doctest: +SKIP
        ...     logits = model(**inputs).logits
    """
    with install(model, bind_rule(model, rule, calibration)) as trace:
        yield trace


def bind_rule(model: nn.Module, rule: Rule, calibration: Calibration | None = None) -> BoundRule:
    """Check `rule` against the model and bind it to every layer; `route` does both steps.

    Raises:
        CalibrationError, ModelError, InputError: as `route` does.
    """
    routers = find_routers(model)
    rule.check(num_experts=routers.num_experts, model_top_k=routers.model_top_k)
    if rule.temperature != 1.0 and routers.family.scoring != "softmax":
        raise InputError(
            f"temperature {rule.temperature} needs a router that scores by softmax, this model's "
            f"scores by {routers.family.scoring}; use temperature 1.0"
        )
    check_calibration(model, routers, rule, calibration)
    selectors = tuple(_bind_layer(site, routers, rule, calibration) for site in routers.sites)
    return BoundRule(rule=rule, routers=routers, selectors=selectors)


@contextmanager
def install(model: nn.Module, bound: BoundRule) -> Iterator[ExpertTrace]:
    """Hook a bound rule into the model inside a `with` block, and yield a new trace."""
    if model in _routed:
        raise ModelError("this model is already inside route(); leave that block first")
    routers = bound.routers
    trace = ExpertTrace(len(routers.sites), routers.num_experts)
    num_candidates = bound.rule.num_candidates(routers.model_top_k)
    attribute = routers.family.top_k_attribute
    with ExitStack() as undo:
        _routed.add(model)
        undo.callback(_routed.discard, model)
        for site, selector in zip(routers.sites, bound.selectors, strict=True):
            experts = experts_of(model, site) if bound.rule.needs_output_norms else None
            hook = _make_hook(site, bound, selector, trace, experts)
            undo.callback(site.module.register_forward_hook(hook).remove)
            undo.callback(setattr, site.module, attribute, getattr(site.module, attribute))
            setattr(site.module, attribute, num_candidates)
        yield trace


def check_calibration(
    model: nn.Module, routers: Routers, rule: Rule, calibration: Calibration | None
) -> None:
    """Raise CalibrationError unless `calibration` serves `rule` on this model."""
    alpha = rule.smallest_alpha(routers.num_experts)
    if rule.required_null is None:
        return
    if calibration is None:
        raise CalibrationError(
            f"rule {rule.method!r} with null {rule.required_null!r} needs a calibration, got "
            "None; make one with bh_routing.calibrate(model, tokenizer, texts)"
        )
    calibration.check(
        null=rule.required_null,
        alpha=alpha,
        num_layers=len(routers.sites),
        num_experts=routers.num_experts,
        model_top_k=routers.model_top_k,
        model_fingerprint=model_fingerprint(model),
    )


def _bind_layer(
    site: RouterSite, routers: Routers, rule: Rule, calibration: Calibration | None
) -> Selector:
    device = next(site.module.parameters()).device
    table = contributions = None
    if rule.required_null in NEEDED.values() and calibration is not None:
        if calibration.contributions is not None:
            contributions = calibration.contributions.to(torch.device("cpu"))
    elif rule.required_null is not None and calibration is not None:
        table = calibration.table(rule.required_null, site.layer).to(device)
    return rule.bind(
        LayerContext(
            layer=site.layer,
            num_experts=routers.num_experts,
            model_top_k=routers.model_top_k,
            device=device,
            table=table,
            contributions=contributions,
            num_layers=len(routers.sites),
        )
    )


def _make_hook(
    site: RouterSite,
    bound: BoundRule,
    select: Selector,
    trace: ExpertTrace,
    experts: nn.Module | None,
) -> Callable[[nn.Module, Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    rule = bound.rule
    normalises = bound.routers.family.normalises(site.module)
    model_top_k = bound.routers.model_top_k

    @torch.no_grad()
    def hook(_: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        router_logits_TE, top_k_weights_TK, top_k_index_TK, *rest = output
        candidates = Candidates(router_logits_TE.float(), top_k_index_TK, top_k_weights_TK)
        if experts is not None:
            hidden_TH = inputs[0].reshape(-1, inputs[0].shape[-1])
            norms_TK = slot_output_norms(experts, hidden_TH, top_k_index_TK, top_k_weights_TK.dtype)
            candidates = candidates._replace(output_norms_TK=norms_TK)
        keep_TK = select(candidates)
        weights_TK = kept_weights(
            top_k_weights_TK,
            keep_TK,
            convention=rule.weights,
            normalises=normalises,
            temperature=rule.temperature,
            router_logits_TE=candidates.router_logits_TE,
            top_k_index_TK=top_k_index_TK,
            model_top_k=model_top_k,
            temperature_weights=rule.temperature_weights,
        )
        trace.record(site.layer, top_k_index_TK, keep_TK)
        index_TK, weights_TK = alias_dropped(top_k_index_TK, weights_TK, keep_TK)
        return (router_logits_TE, weights_TK, index_TK, *rest)

    return hook
