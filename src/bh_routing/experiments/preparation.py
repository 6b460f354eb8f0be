"""Load and check the inputs of a run, before it writes its first file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from bh_routing.engine.generate import choose_chat_template, encode_prompt
from bh_routing.errors import InputError
from bh_routing.experiments.budget import bring_to_budget
from bh_routing.experiments.calibrating import obtain_calibration
from bh_routing.experiments.configurations import make_rules
from bh_routing.experiments.executors import Threads, choose_threads, make_grid, torch_threads
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.identity import identify
from bh_routing.experiments.quality import QualityPhase
from bh_routing.experiments.spec_errors import shorten
from bh_routing.experiments.specs import ModelSpec, RunSpec
from bh_routing.experiments.store import ResultStore
from bh_routing.models.load import load_model
from bh_routing.models.routers import ModelFacts, describe_model
from bh_routing.models.routing import bind_rule

log = logging.getLogger(__name__)


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


class Preparation:
    """A validated run; constructing one writes nothing.

    Args:
        spec: the run's spec, from `fit_to_loaded`.
        store: the folder, open for reading.
        loaded: the model.
    Raises:
        InputError: a prompt, calibration, text or the folder doesn't fit.
    """

    def __init__(self, spec: RunSpec, store: ResultStore, loaded: Loaded) -> None:
        tokenizer = choose_chat_template(loaded.tokenizer, spec.chat_template)
        if tokenizer.chat_template:
            log.info("each prompt is a user's message in the tokenizer's chat template")
        self.loaded = loaded = loaded._replace(tokenizer=tokenizer)
        self.rules = make_rules(spec.configs, spec.budget)
        texts = [prompt.text for prompt in spec.prompts]
        check_prompts(texts, spec.max_tokens, loaded.tokenizer, loaded.facts)
        identity = identify(spec.model, loaded.model, loaded.tokenizer, max_tokens=spec.max_tokens)
        store.check(identity)
        self.quality = None if spec.no_eval else QualityPhase(spec, loaded.tokenizer, loaded.facts)
        start = time.perf_counter()
        with torch_threads(loaded.threads.batch):
            stored = store.stored.document if store.stored is not None else {}
            calibration, self.calibration_document = obtain_calibration(
                spec, self.rules, loaded.model, loaded.tokenizer, spec.output, stored
            )
            known = stored.get("budget", [])
            self.rules, self.budget = bring_to_budget(
                spec, self.rules, loaded.model, loaded.tokenizer, calibration, known
            )
        self.calibrate_sec = time.perf_counter() - start
        self.subject = Subject(loaded.model, loaded.tokenizer, calibration)
        for named in self.rules:
            with _naming(named.name):
                bind_rule(loaded.model, named.rule, calibration)
        tables = calibration.table_fingerprints if calibration else {}
        self.identity = replace(identity, tables=tables)
        store.check(self.identity)
        if self.quality is not None and store.stored is not None:
            self.quality.ledger(spec.output, self.identity)
        self.grid = make_grid(self.rules, spec.prompts, calibration)


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
                f"leaves {max(room, 0)} beside {max_tokens} new ones; shorten it or generate "
                "fewer tokens (--max-tokens, max_new_tokens)"
            )


@contextmanager
def _naming(config_name: str) -> Iterator[None]:
    """Prefix an error's message with the configuration's name."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"configuration {config_name!r}: {error}") from error
