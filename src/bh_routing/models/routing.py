"""Run a model under a rule: `route` hooks the routers, and removes every hook on exit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bh_routing.errors import CalibrationError, InputError, ModelError
from bh_routing.models.capture import real_tokens, text_stack_of
from bh_routing.models.experts import slot_output_norms
from bh_routing.models.routers import (
    ROUTED,
    Routers,
    find_routers,
    model_fingerprint,
    reject_routed,
    unwrapped,
)
from bh_routing.models.rows import RowsOfCall, end_ids
from bh_routing.models.sites import Decision, Proposal, RouterFacts, RouterSite, RoutingHook, Undo
from bh_routing.models.trace import ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.plan import Candidates, Selector, keep_best
from bh_routing.rules.router import RoutedSlots, Router, SoftmaxFamily, Weighing

Decider = Callable[[Tensor, torch.dtype], RoutedSlots]
"""Router logits (T, E) and the weights' dtype -> decided and weighted slots."""
Fuse = Callable[[Rule, LayerContext, SoftmaxFamily], Router | None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BoundRule:
    """A rule bound to one model; all work that doesn't depend on tokens is done."""

    rule: Rule
    routers: Routers
    selectors: tuple[Selector, ...]
    """One per router, in order."""
    contexts: tuple[LayerContext, ...]
    """Context that each selector was bound to."""
    deciders: tuple[Decider | None, ...]
    """Fused deciders, one per router, used instead of its selector unless None."""


@contextmanager
def route(
    model: nn.Module, rule: Rule, calibration: Calibration | None = None
) -> Iterator[ExpertTrace]:
    """Run `model` under `rule` inside a `with` block; on exit the model is restored.

    The router proposes slots and the rule decides which of them stay. A dropped slot gets weight 0
    and the index of the token's own best expert, so no backend reads a dropped expert's weights.

    Autograd treats the selection as constant; gradients reach the gate through the weights of the
    kept slots, as with a smaller top-k. Gradient checkpointing is rejected: it reruns layers in the
    backward pass, which may come after the block.

    Args:
        model: a transformers model with mixture-of-experts layers; it may be compiled, or wrapped
            by PEFT or DistributedDataParallel.
        rule: decides which slots stay.
        calibration: reference distributions, required by rules whose null needs a table.
    Returns:
        A context manager that yields the trace of kept experts.
    Raises:
        CalibrationError: the rule needs a calibration, and none or another model's was given.
        ModelError: the model has no routers, or they are already inside `route`; the model is
            copied or pickled inside the block, or a training step uses gradient checkpointing.
        InputError: the rule doesn't fit the model, for example asks for more experts than exist.
    Example:
        >>> with route(model, TopK(4)) as trace:                        # doctest: +SKIP
        ...     logits = model(**inputs).logits
    """
    with install(model, bind_rule(model, rule, calibration)) as trace:
        yield trace


def bind_rule(
    model: nn.Module,
    rule: Rule,
    calibration: Calibration | None = None,
    fuse: Fuse | None = None,
) -> BoundRule:
    """Check `rule` against the model and bind it to every layer, as `route` does.

    With `fuse`, which returns a layer's fused router or None, kept experts are the same bit for
    bit, except for ties of logits: a fused router prefers the smaller expert index, torch any.

    Raises:
        CalibrationError, ModelError, InputError: as in `route`.
    """
    routers = find_routers(model)
    check_rule(routers, rule)
    check_calibration(model, routers, rule, calibration)
    contexts = tuple(
        layer_context(routers, site.layer, rule, calibration, _device(site))
        for site in routers.sites
    )
    return BoundRule(
        rule=rule,
        routers=routers,
        selectors=tuple(rule.bind(context) for context in contexts),
        contexts=contexts,
        deciders=tuple(
            None if fuse is None else _decider(rule, context, site.facts, fuse)
            for site, context in zip(routers.sites, contexts, strict=True)
        ),
    )


def _decider(rule: Rule, context: LayerContext, facts: RouterFacts, fuse: Fuse) -> Decider | None:
    if rule.needs_output_norms or not facts.is_plain_softmax:
        return None

    @cache
    def router(dtype: torch.dtype | None) -> Router | None:
        family = SoftmaxFamily(normalises=facts.normalises, weights_dtype=dtype)
        return fuse(rule, context, family)

    if router(None) is None:
        return None

    def decide(router_logits_TE: Tensor, dtype: torch.dtype) -> RoutedSlots:
        route = router(dtype)
        assert route is not None, "whether there is a kernel doesn't depend on the dtype"
        return route(router_logits_TE)

    return decide


def check_rule(routers: Routers, rule: Rule) -> None:
    """Raise InputError if `rule` can't run on these routers with any calibration."""
    rule.check(num_experts=routers.num_experts, model_top_k=routers.model_top_k)
    for site in routers.sites:
        _check_site(site, rule)


def _check_site(site: RouterSite, rule: Rule) -> None:
    """Raise InputError if this router doesn't support `rule`."""
    facts = site.facts
    if rule.temperature != 1.0 and not facts.takes_temperature:
        raise InputError(
            f"temperature {rule.temperature} needs a router that weighs and selects by the softmax "
            f"of its logits alone, and {site.name} doesn't; use temperature 1.0"
        )
    num_slots = rule.num_candidates(facts.top_k)
    if num_slots > facts.most_slots:
        reason = facts.why_not_wider
        if facts.groups is not None and not reason:
            reason = f"{facts.groups.num_chosen} of {facts.groups.num_groups} groups hold no more"
        raise InputError(
            f"rule {rule.method!r} asks for {num_slots} experts a token, {site.name} can propose "
            f"at most {facts.most_slots} ({reason}); ask for no more than that"
        )
    if rule.needs_output_norms and not facts.experts_see_input:
        raise InputError(
            f"rule {rule.method!r} runs the experts on the router's input, and those of "
            f"{site.name} are given something else; choose another rule"
        )


@contextmanager
def install(
    model: nn.Module, bound: BoundRule, *, decode_batch: int | None = None
) -> Iterator[ExpertTrace]:
    """Hook a bound rule into the model inside a `with` block, and yield a new trace.

    Args:
        model: the model that the rule is bound to.
        bound: the rule.
        decode_batch: in a call, position t of each so many sequences is a decode step. Only for
            independent sequences: a step must not contain a text's own future tokens.
    """
    routers = bound.routers
    modules = [site.module for site in routers.sites]
    reject_routed(modules)
    trace = ExpertTrace(len(routers.sites), routers.num_experts)
    with ExitStack() as undo:
        ROUTED.update(modules)
        undo.callback(ROUTED.difference_update, modules)
        # Compiled code ignores new hooks, and keeps running removed ones.
        torch.compiler.reset()
        undo.callback(torch.compiler.reset)
        rows = None
        if bound.rule.unit != "token":
            rows = RowsOfCall(decode_batch=decode_batch, end_ids=end_ids(unwrapped(model)))
        for remove in _watch_calls(text_stack_of(unwrapped(model), routers.sites), trace, rows):
            undo.callback(remove)
        parts = zip(routers.sites, bound.selectors, bound.deciders, strict=True)
        for site, selector, decider in parts:
            callback = (
                _make_callback(site, bound, selector, trace, rows)
                if decider is None
                else _make_fused_callback(site, decider, trace)
            )
            undo.callback(site.watch(callback))
            if (widener := site.facts.widener) is not None:
                undo.callback(setattr, widener.owner, widener.name, widener.get())
                num_slots = bound.rule.num_candidates(site.facts.top_k)
                setattr(widener.owner, widener.name, num_slots)
        yield trace


def check_calibration(
    model: nn.Module, routers: Routers, rule: Rule, calibration: Calibration | None
) -> None:
    """Raise CalibrationError unless `calibration` fits `rule` and this model."""
    alpha = rule.smallest_alpha(routers.num_experts)
    if rule.required_null is None:
        return
    if calibration is None:
        raise CalibrationError(
            f"rule {rule.method!r} with null {rule.required_null!r} needs a calibration, got "
            "None; make one with bh_routing.calibrate(model, tokenizer, texts, rules=[rule])"
        )
    calibration.check(
        null=rule.required_null,
        alpha=alpha,
        num_layers=len(routers.sites),
        num_experts=routers.num_experts,
        model_top_k=routers.model_top_k,
        model_fingerprint=model_fingerprint(model),
    )


def layer_context(
    routers: Routers,
    layer: int,
    rule: Rule,
    calibration: Calibration | None,
    device: torch.device,
) -> LayerContext:
    """Return the context that `rule` is bound to in a layer.

    Raises:
        CalibrationError: the calibration has no table of the rule's null.
    """
    table = contributions = None
    if rule.required_null is not None and calibration is not None:
        table, contributions = calibration.references(rule.required_null, layer)
    return LayerContext(
        layer=layer,
        num_experts=routers.num_experts,
        model_top_k=routers.model_top_k,
        device=device,
        table=None if table is None else table.to(device),
        contributions=contributions,
        num_layers=len(routers.sites),
    )


def _device(site: RouterSite) -> torch.device:
    return next(site.module.parameters()).device


def _watch_calls(stack: nn.Module, trace: ExpertTrace, rows: RowsOfCall | None) -> Iterator[Undo]:
    """Pass the mask of tokens of each call to trace and rows; yield functions that undo it."""
    names = list(inspect.signature(stack.forward).parameters)

    def begin(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and stack.training and _is_checkpointing(stack):
            raise ModelError(
                "gradient checkpointing runs layers again in the backward pass, which may come "
                "after route(); disable it, or call model.eval(), first"
            )
        arguments = dict(zip(names, args, strict=False)) | keywords
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        is_step = isinstance(tokens, Tensor) and tokens.shape[1] == 1
        trace.begin(real_tokens(arguments), is_step=is_step)
        if rows is not None:
            rows.note(arguments)

    def end(*_: Any) -> None:
        trace.begin(None)

    yield stack.register_forward_pre_hook(RoutingHook(begin), with_kwargs=True).remove
    yield stack.register_forward_hook(RoutingHook(end), always_call=True).remove


def _is_checkpointing(stack: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in stack.modules())


def _make_callback(
    site: RouterSite,
    bound: BoundRule,
    select: Selector,
    trace: ExpertTrace,
    rows: RowsOfCall | None,
) -> Callable[[Proposal], Decision]:
    rule, facts = bound.rule, site.facts
    # Where the normalised sum isn't that of the slots' weights, the factor is applied below.
    has_own_sum = facts.normalises and (facts.has_gains or facts.shares_with > 0)
    # Such a family normalises the masses, so preserving their sum is its own convention.
    keeps_sum = has_own_sum and rule.weights != "renormalize"

    weighing = Weighing(
        normalises=facts.normalises and not has_own_sum,
        model_top_k=facts.top_k,
        convention="model" if keeps_sum else rule.weights,
        temperature=rule.temperature,
        temperature_weights=rule.temperature_weights,
    )

    def decide(proposal: Proposal) -> Decision:
        hidden_TH, scores_TE, index_TK, proposed_TK, masses_TK, shared_TS = proposal
        candidates = proposed = Candidates(scores_TE, index_TK, proposed_TK)
        with torch.no_grad():
            if facts.normalises and index_TK.shape[-1] > facts.top_k:
                # A rule compares weights with those of the model's own top-k in calibration.
                is_own_TK = keep_best(candidates, facts.top_k)
                factor_T1 = _sum_ratio(masses_TK, is_own_TK, shared_TS)
                own_scale_TK = (proposed_TK.float() * factor_T1).to(proposed_TK.dtype)
                candidates = candidates._replace(top_k_weights_TK=own_scale_TK)
            if rule.needs_output_norms:
                norms_TK = slot_output_norms(site.experts, hidden_TH, index_TK, proposed_TK.dtype)
                candidates = candidates._replace(output_norms_TK=norms_TK)
            if rows is not None:
                known = rows.of(len(index_TK), index_TK.device)
                candidates = candidates._replace(rows=known)
            keep_TK = select(candidates)
        index_TK, weights_TK, _ = weighing.route(proposed, keep_TK)
        if keeps_sum:
            factor_T1 = _sum_ratio(masses_TK, keep_TK, shared_TS)
            weights_TK = (weights_TK.float() * factor_T1).to(proposed_TK.dtype)
            if shared_TS is not None:
                shared_TS = (shared_TS.float() * factor_T1).to(shared_TS.dtype)
        index_TK = trace._record(site.layer, index_TK, keep_TK)
        return Decision(index_TK, weights_TK, shared_TS)

    return decide


def _make_fused_callback(
    site: RouterSite, decider: Decider, trace: ExpertTrace
) -> Callable[[Proposal], Decision]:
    @torch.no_grad()
    def decide(proposal: Proposal) -> Decision:
        dtype = proposal.top_k_weights_TK.dtype
        index_TK, weights_TK, keep_TK = decider(proposal.scores_TE, dtype)
        index_TK = trace._record(site.layer, index_TK, keep_TK)
        return Decision(index_TK, weights_TK, proposal.shared_weights_TS)

    return decide


def _sum_ratio(masses_TK: Tensor, keep_TK: Tensor, shared_TS: Tensor | None) -> Tensor:
    """Return the ratio of all masses to the kept ones, shared experts in both: shape (T, 1)."""
    masses_TK = masses_TK.float()
    all_T1 = masses_TK.sum(-1, keepdim=True)
    kept_T1 = torch.where(keep_TK, masses_TK, 0.0).sum(-1, keepdim=True)
    if shared_TS is not None:
        shared_T1 = shared_TS.float().sum(-1, keepdim=True)
        return (all_T1 + shared_T1) / (kept_T1 + shared_T1)
    return all_T1 / kept_T1
