"""Fit configurations to a model, load it, and check a run's inputs before its first file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

from torch import nn

from bh_routing.engine.generate import choose_chat_template, encode_prompt
from bh_routing.errors import InputError, unknown_name
from bh_routing.experiments.budget import bring_to_budget
from bh_routing.experiments.calibrating import obtain_calibration
from bh_routing.experiments.configurations import NamedRule, make_rules
from bh_routing.experiments.defaults import STANDARD_TOP_K, standard_configs
from bh_routing.experiments.executors import Cell, Threads, choose_threads, make_grid, torch_threads
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.identity import RunIdentity, identify
from bh_routing.experiments.quality import QualityLedger, scored_documents
from bh_routing.experiments.quality_text import scored_text
from bh_routing.experiments.spec_errors import shorten
from bh_routing.experiments.specs import ChatTemplate, ConfiguredSpec, ModelSpec, RunSpec
from bh_routing.experiments.store import ResultStore
from bh_routing.models.load import load_model
from bh_routing.models.outlook import Outlook, outlook_from_routers, read_outlook
from bh_routing.models.routers import ModelFacts, describe_model, find_routers, model_type_of
from bh_routing.models.routing import bind_rule, check_rule
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import make_rule

log = logging.getLogger(__name__)

SpecT = TypeVar("SpecT", bound=ConfiguredSpec)


class Fitted(NamedTuple, Generic[SpecT]):
    """A spec whose configurations the model can run."""

    spec: SpecT
    left_out: dict[str, str]
    """Standard configurations that the model can't run -> reason."""


def fit_to_model(fitted: Fitted[SpecT], outlook: Outlook) -> Fitted[SpecT]:
    """Adapt standard configurations to the model's own k; leave out those that it can't run.

    A configuration is standard until it is changed. One that the user wrote or named is never left
    out. A later call, when more of the model is known, keeps earlier results.

    Args:
        fitted: result of an earlier call, or `Fitted(spec, {})`.
        outlook: known properties of the model; without its k nothing is fitted yet.
    Raises:
        InputError: a name isn't among the configurations, or a configuration of the user can't run
            on this model.
    """
    spec, left_out = fitted
    if outlook.top_k is None:
        return fitted
    configs = select_configs(_follow(spec.configs, outlook.top_k), spec.only)
    standard = standard_configs(outlook.top_k)
    reasons = {}
    for name, _, rule in make_rules(configs, spec.budget):
        if not (reason := _why_not(rule, outlook)):
            continue
        if name in (spec.only or ()) or configs[name] != standard.get(name):
            raise InputError(f"configuration {name!r}: {reason}; use temperature 1.0")
        log.info("configuration %s is left out: %s", name, reason)
        reasons[name] = reason
    kept = {name: config for name, config in configs.items() if name not in reasons}
    return Fitted(spec.model_copy(update={"configs": kept}), left_out | reasons)


def fit_to_config(spec: SpecT) -> Fitted[SpecT]:
    """Fit a spec to the model's config.json, before the model is loaded.

    Raises:
        ModelError: the model can't be found or reached, or its family isn't supported.
        InputError: as in `fit_to_model`, or a configuration is invalid.
    """
    make_rules(spec.configs, spec.budget)
    return fit_to_model(Fitted(spec, {}), read_outlook(spec.model))


def fit_to_loaded(fitted: Fitted[SpecT], model: nn.Module) -> Fitted[SpecT]:
    """Fit a spec to a loaded model's probed routers and check every rule, without a calibration.

    Raises:
        InputError: a configuration can't run on this model.
    """
    routers = find_routers(model)
    fitted = fit_to_model(fitted, outlook_from_routers(model_type_of(model), routers))
    for named in make_rules(fitted.spec.configs, fitted.spec.budget):
        try:
            check_rule(routers, named.rule)
        except InputError as error:
            raise type(error)(f"configuration {named.name!r}: {error}") from error
    return fitted


def select_configs(
    configs: Mapping[str, dict[str, Any]], names: Iterable[str] | None
) -> dict[str, dict[str, Any]]:
    """Select configurations by name, in the order of `configs`; None selects all.

    Raises:
        InputError: a name is unknown; the error suggests the nearest one.
    """
    if names is None:
        return dict(configs)
    wanted = list(names)
    for name in wanted:
        if name not in configs:
            raise unknown_name("configuration", name, configs)
    return {name: config for name, config in configs.items() if name in wanted}


def _follow(configs: Mapping[str, dict[str, Any]], top_k: int) -> dict[str, dict[str, Any]]:
    """Set the model's own k in standard configurations and in the baseline's name."""
    written = standard_configs(STANDARD_TOP_K)
    fitting = dict(zip(written, standard_configs(top_k).items(), strict=True))
    followed: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        if config != written.get(name):
            followed[name] = config
            continue
        own_name, own_config = fitting[name]
        if own_name not in configs or own_name == name:
            followed[own_name] = own_config
        elif make_rule(configs[own_name]) != make_rule(own_config):
            raise InputError(
                f"configuration {own_name!r} isn't the model's own top-{top_k}, which is the "
                "baseline and has this name; rename it"
            )
    if followed.keys() != configs.keys():
        log.info(
            "the model uses %d experts per token: the baseline is topk_%d, and the standard BH "
            "configurations keep at most %d",
            *(top_k,) * 3,
        )
    return followed


def _why_not(rule: Rule, outlook: Outlook) -> str:
    """Return why the model can't run this rule; empty if no reason is known."""
    if rule.temperature == 1.0 or outlook.takes_temperature is not False:
        return ""
    return (
        f"temperature {rule.temperature:g} needs a router that weighs and selects by the softmax "
        f"of its logits alone, and {outlook.model_type}'s doesn't"
    )


class Loaded(NamedTuple):
    """A run's loaded model."""

    model: Any
    tokenizer: Any
    facts: ModelFacts
    seconds: float
    threads: Threads


def load(spec: ModelSpec) -> Loaded:
    """Load a model and log its properties.

    Raises:
        ModelError: the model can't be found, loaded or routed.
    """
    start = time.perf_counter()
    model, tokenizer = load_model(
        spec.model, device=spec.device, dtype=spec.dtype, device_map=spec.device_map
    )
    log.info("trying out the routers of %s", spec.model)
    facts = describe_model(model)
    threads = choose_threads(model)
    seconds = time.perf_counter() - start
    log.info(
        "loaded %s: %d layers with %d experts, top-%d, %s on %s (threads: %d, for batches %d), "
        "in %.1f s",
        spec.model,
        facts.num_layers,
        facts.num_experts,
        facts.model_top_k,
        facts.dtype,
        facts.device,
        *threads,
        seconds,
    )
    return Loaded(model, tokenizer, facts, seconds, threads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """A validated run."""

    loaded: Loaded
    subject: Subject
    rules: list[NamedRule]
    """At the spec's budget, if it has one."""
    budget: list[dict[str, Any]]
    """Settings of the search that led there, for run.json."""
    calibration_document: dict[str, Any] | None
    """The calibration's entry in run.json."""
    calibrate_sec: float
    """Time of the calibration and of the search."""
    identity: RunIdentity
    ledger: QualityLedger | None
    """The scores of held-out text; None: quality isn't scored."""
    grid: list[Cell]


def prepare(spec: RunSpec, store: ResultStore, loaded: Loaded) -> Preparation:
    """Calibrate the model, bring the rules to their budget and check a run; writes nothing.

    Args:
        spec: the run's spec, from `fit_to_loaded`.
        store: the folder, open for reading.
        loaded: the model.
    Raises:
        InputError: a prompt, calibration, text or the folder doesn't fit.
    """
    loaded = _with_chat_template(loaded, spec.chat_template)
    model, tokenizer, facts, *_ = loaded
    rules = make_rules(spec.configs, spec.budget)
    check_prompts([prompt.text for prompt in spec.prompts], spec.max_tokens, tokenizer, facts)
    identity = identify(spec.model, model, tokenizer, max_tokens=spec.max_tokens)
    store.check(identity)
    text = None if spec.no_eval else scored_text(spec, scored_documents(spec), tokenizer, facts)
    stored = store.stored.document if store.stored is not None else {}
    start = time.perf_counter()
    with torch_threads(loaded.threads.batch):
        calibration, document = obtain_calibration(
            spec, rules, model, tokenizer, spec.output, stored
        )
        known = stored.get("budget", [])
        rules, budget = bring_to_budget(spec, rules, model, tokenizer, calibration, known)
    calibrate_sec = time.perf_counter() - start
    for named in rules:
        with _naming(named.name):
            bind_rule(model, named.rule, calibration)
    identity = replace(identity, tables=calibration.table_fingerprints if calibration else {})
    store.check(identity)
    make_ledger = QualityLedger.resume if stored else QualityLedger
    return Preparation(
        loaded=loaded,
        subject=Subject(model, tokenizer, calibration),
        rules=rules,
        budget=budget,
        calibration_document=document,
        calibrate_sec=calibrate_sec,
        identity=identity,
        ledger=make_ledger(spec.output, text, identity) if text is not None else None,
        grid=make_grid(rules, spec.prompts, calibration),
    )


def _with_chat_template(loaded: Loaded, mode: ChatTemplate) -> Loaded:
    tokenizer = choose_chat_template(loaded.tokenizer, mode)
    if tokenizer.chat_template:
        log.info("each prompt is a user's message in the tokenizer's chat template")
    return loaded._replace(tokenizer=tokenizer)


def check_prompts(
    prompts: Sequence[str], max_tokens: int, tokenizer: Any, facts: ModelFacts
) -> None:
    """Reject a prompt that has no token or leaves no room for the continuation.

    Raises:
        InputError: names the prompt's number, its length, the limit and the remedy.
    """
    for number, prompt in enumerate(prompts, start=1):
        length = len(encode_prompt(tokenizer, prompt))
        shown = f"prompt {number} ({shorten(prompt)!r})"
        if length == 0:
            raise InputError(f"{shown} gives no token with this model's tokenizer; change it")
        if facts.context_length is None:
            continue
        room = facts.context_length - max_tokens
        if length > room:
            raise InputError(
                f"{shown} has {length} tokens, and the model's context of {facts.context_length} "
                f"leaves {max(room, 0)} next to {max_tokens} new ones; shorten it or generate "
                "fewer tokens (--max-tokens, max_new_tokens)"
            )


@contextmanager
def _naming(config_name: str) -> Iterator[None]:
    """Prefix an error's message with the configuration's name."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"configuration {config_name!r}: {error}") from error
