"""A whole run: check everything, then experiments, then whatever is made from them.

Nothing is written before the spec, the model, the prompts, the calibration and the folder have
been checked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bh_routing.errors import BHRoutingError, InputError
from bh_routing.experiments.calibrating import (
    describe_nulls,
    obtain_calibration,
    save_calibration,
)
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.files import render_json, write_atomically
from bh_routing.experiments.grid import make_grid, run_grid
from bh_routing.experiments.identity import RunIdentity
from bh_routing.experiments.provenance import (
    collect_provenance,
    device_name,
    peak_memory_bytes,
)
from bh_routing.experiments.run_log import FILE_ONLY, RunLog
from bh_routing.experiments.spec import NamedRule, RunSpec, make_rules, resolved, shorten
from bh_routing.experiments.store import ResultStore
from bh_routing.experiments.threads import choose_threads, torch_threads
from bh_routing.models.discovery import ModelFacts, describe_model
from bh_routing.models.load import load_model
from bh_routing.models.routing import route
from bh_routing.records import LOG, STATUS_OK, SUMMARY_JSON, ExperimentRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """What is made of the results at the end; the reading tower's functions, passed in.

    Each gets what `load` returns for the folder; None leaves that step out.
    """

    load: Callable[[Path], Any] | None = None
    """Folder -> table of experiments."""
    analyze: Callable[[Any], dict[str, Any]] | None = None
    """Table -> content of analysis_summary.json."""
    visualize: Callable[[Any, Path], Any] | None = None
    """Table and folder -> plots in the folder."""
    report: Callable[[Any, dict[str, Any], Path], Any] | None = None
    """Table, summary and folder -> REPORT.md in the folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOutcome:
    """How a run ended."""

    folder: Path
    records: tuple[ExperimentRecord, ...]
    """One row an experiment of the spec, in the CSV's order."""
    num_run: int
    """Experiments done now."""
    num_reused: int
    """Experiments that an earlier run of the folder had finished."""
    problems: tuple[str, ...]
    """One sentence for each failed experiment and each later step that failed."""

    @property
    def exit_code(self) -> int:
        """0 if everything succeeded, else 1."""
        return 1 if self.problems else 0


class _Loaded(NamedTuple):
    """A model that was loaded for a run."""

    model: Any
    tokenizer: Any
    facts: ModelFacts
    seconds: float
    threads: int


class _Prepared:
    """What a run needs before its first experiment; making one writes nothing."""

    def __init__(self, spec: RunSpec, store: ResultStore, loaded: _Loaded) -> None:
        self.loaded = loaded
        self.facts = loaded.facts
        self.rules = make_rules(spec.configs)
        check_prompts(spec, loaded.tokenizer, self.facts)
        _check_rules(self.rules, self.facts)
        store.check(self._identity(spec, None))
        start = time.perf_counter()
        self.calibration = obtain_calibration(
            spec, self.rules, loaded.model, loaded.tokenizer, store.stored
        )
        self.calibrate_sec = time.perf_counter() - start
        calibration = self.calibration.calibration
        self.subject = Subject(loaded.model, loaded.tokenizer, calibration)
        for named in self.rules:
            _check_routing(self.subject, named)
        self.identity = self._identity(spec, calibration.fingerprint if calibration else None)
        self.grid = make_grid(self.rules, spec.prompts)

    def _identity(self, spec: RunSpec, calibration: str | None) -> RunIdentity:
        return RunIdentity(
            model=spec.model,
            model_fingerprint=self.facts.fingerprint,
            dtype=self.facts.dtype,
            device_type=self.facts.device,
            max_tokens=spec.max_tokens,
            calibration=calibration,
        )


def run(spec: RunSpec, hooks: Hooks | None = None) -> RunOutcome:
    """Run every configuration on every prompt, and keep each result as soon as it is there.

    A run that was stopped goes on where it was; failed experiments are tried again. What
    finished is never run twice and never lost.

    Args:
        spec: what to run.
        hooks: what to make of the results; None: nothing.
    Returns:
        The rows and what failed.
    Raises:
        InputError: the spec, model, calibration or folder can't be used; nothing was touched.
        KeyboardInterrupt: the run was interrupted; what finished is kept.
    """
    start = time.perf_counter()
    with (
        RunLog() as run_log,
        ResultStore(
            spec.output, resume=spec.resume, checkpoint_interval=spec.checkpoint_interval
        ) as store,
    ):
        loaded = _load(spec)
        with torch_threads(loaded.threads):
            prepared = _Prepared(spec, store, loaded)
            keys = [cell.key for cell in prepared.grid]
            store.begin(prepared.identity, _document(spec, prepared, store), keys)
            run_log.write_to(spec.output / LOG)
            try:
                return _run_begun(spec, prepared, store, hooks or Hooks(), start)
            except KeyboardInterrupt:
                _say_how_to_go_on(spec, prepared, store)
                raise
            except BHRoutingError as error:
                log.error("%s", error, extra=FILE_ONLY)
                raise


def _load(spec: RunSpec) -> _Loaded:
    start = time.perf_counter()
    model, tokenizer = load_model(spec.model, device=spec.device, dtype=spec.dtype)
    facts = describe_model(model)
    seconds = time.perf_counter() - start
    threads = choose_threads(model.device, facts.num_parameters)
    log.info(
        "loaded %s: %d layers with %d experts, top-%d, %s on %s (threads: %d), in %.1f s",
        spec.model,
        facts.num_layers,
        facts.num_experts,
        facts.model_top_k,
        facts.dtype,
        facts.device,
        threads,
        seconds,
    )
    return _Loaded(model, tokenizer, facts, seconds, threads)


def _say_how_to_go_on(spec: RunSpec, prepared: _Prepared, store: ResultStore) -> None:
    log.warning(
        "interrupted: %d of %d experiments are finished and kept in %s; the same command goes on "
        "from there",
        sum(record.status == STATUS_OK for record in store.records),
        len(prepared.grid),
        spec.output,
    )


def _run_begun(
    spec: RunSpec, prepared: _Prepared, store: ResultStore, hooks: Hooks, start: float
) -> RunOutcome:
    """Do the work of a run whose folder is open for writing."""
    calibration = prepared.calibration.calibration
    if calibration is not None:
        save_calibration(calibration, spec.output)
    grid = prepared.grid
    num_reused = sum(store.finished_record(cell.key) is not None for cell in grid)
    _announce(spec, prepared, store, num_reused)
    earlier_sec = sum(
        record.inference_time_sec for record in store.records if record.status == STATUS_OK
    )
    phase_start = time.perf_counter()
    num_run = run_grid(prepared.subject, prepared.rules, grid, spec.max_tokens, store)
    store.flush()
    timing = {
        "load_sec": prepared.loaded.seconds,
        "calibrate_sec": prepared.calibrate_sec,
        # Of experiments that an earlier session finished, only their own time is known.
        "experiments_sec": earlier_sec + time.perf_counter() - phase_start,
        "quality_sec": None,
        "total_sec": earlier_sec + time.perf_counter() - start,
    }
    peak = peak_memory_bytes(prepared.subject.model.device)
    store.update_document({"timing": timing, "peak_memory_bytes": peak})
    problems = [
        f"{record.config_name} on {shorten(record.prompt_text)!r} failed: {record.error}"
        for record in store.records
        if record.status != STATUS_OK
    ]
    problems += conclude(spec.output, hooks)
    for problem in problems:
        log.error("%s", problem)
    timing["total_sec"] = earlier_sec + time.perf_counter() - start
    store.update_document({"timing": timing})
    log.info(
        "%d of %d experiments are finished (%d now, %d before) after %.1f s; see %s",
        sum(record.status == STATUS_OK for record in store.records),
        len(grid),
        num_run,
        num_reused,
        time.perf_counter() - start,
        spec.output,
    )
    return RunOutcome(
        folder=spec.output,
        records=tuple(store.records),
        num_run=num_run,
        num_reused=num_reused,
        problems=tuple(problems),
    )


def conclude(folder: Path, hooks: Hooks) -> list[str]:
    """Analyse, draw and report; return a sentence for each step that failed.

    The results are on disk by now, so no failure here can lose any.
    """
    problems: list[str] = []

    def guarded(what: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # the results are safe; say what failed and go on
            log.exception("%s failed", what, extra=FILE_ONLY)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            problems.append(f"{what} failed ({reason}); the results in {folder} are complete")
            return None

    if hooks.load is None:
        return problems
    load, analyze, visualize, report = hooks.load, hooks.analyze, hooks.visualize, hooks.report
    results = guarded("reading the results", lambda: load(folder))
    if results is None:
        return problems
    summary = None
    if analyze is not None:
        summary = guarded("the analysis", lambda: _write_summary(folder, analyze(results)))
    if visualize is not None:
        guarded("drawing the plots", lambda: visualize(results, folder))
    if report is not None and summary is not None:
        guarded("writing the report", lambda: report(results, summary, folder))
    return problems


def check_prompts(spec: RunSpec, tokenizer: Any, facts: ModelFacts) -> None:
    """Refuse a prompt that is no token, or leaves no room for the continuation.

    Raises:
        InputError: the prompt's number, its length, the room there is, and what to change.
    """
    for number, prompt in enumerate(spec.prompts, start=1):
        length = len(tokenizer(prompt.text)["input_ids"])
        shown = f"prompt {number} ({shorten(prompt.text)!r})"
        if length == 0:
            raise InputError(f"{shown} gives no token with this model's tokenizer; change it")
        if facts.context_length is None:
            continue
        room = facts.context_length - spec.max_tokens
        if length > room:
            raise InputError(
                f"{shown} has {length} tokens, and the model's context of {facts.context_length} "
                f"leaves {max(room, 0)} beside {spec.max_tokens} new ones; shorten it or lower "
                "--max-tokens"
            )


def _check_rules(rules: Sequence[NamedRule], facts: ModelFacts) -> None:
    for named in rules:
        try:
            named.rule.check(num_experts=facts.num_experts, model_top_k=facts.model_top_k)
        except InputError as error:
            raise type(error)(f"configuration {named.name!r}: {error}") from error


def _check_routing(subject: Subject, named: NamedRule) -> None:
    """Enter and leave: whatever a rule finds wrong with the model or calibration shows now."""
    try:
        with route(subject.model, named.rule, subject.calibration):
            pass
    except InputError as error:
        raise type(error)(f"configuration {named.name!r}: {error}") from error


def _document(spec: RunSpec, prepared: _Prepared, store: ResultStore) -> dict[str, Any]:
    """Content of run.json before the first experiment."""
    facts = asdict(prepared.facts)
    stored = store.stored.document if store.stored is not None else {}
    provenance = {**collect_provenance(spec.seed), "threads": prepared.loaded.threads}
    return {
        "schema_version": prepared.identity.schema_version,
        "spec": resolved(spec, prepared.rules),
        "model": {
            "name": spec.model,
            **facts,
            "device_name": device_name(prepared.subject.model.device),
        },
        "calibration": prepared.calibration.document or stored.get("calibration"),
        "nulls": describe_nulls(
            prepared.rules,
            num_experts=prepared.facts.num_experts,
            model_top_k=prepared.facts.model_top_k,
            seed=spec.seed,
        ),
        "provenance": provenance,
        "sessions": [*stored.get("sessions", []), provenance],
        "timing": stored.get("timing"),
        "peak_memory_bytes": stored.get("peak_memory_bytes"),
    }


def _announce(spec: RunSpec, prepared: _Prepared, store: ResultStore, num_reused: int) -> None:
    log.info(
        "%d configurations on %d prompts, %d tokens each, into %s",
        len(prepared.rules),
        len(spec.prompts),
        spec.max_tokens,
        spec.output,
    )
    if num_reused:
        log.info(
            "going on with the run in %s: %d of %d experiments are finished already",
            spec.output,
            num_reused,
            len(prepared.grid),
        )
    if store.num_unplanned:
        log.info(
            "%d finished experiments in %s aren't part of this run; they stay in its journal",
            store.num_unplanned,
            spec.output,
        )
    log.info("each configuration is warmed up by a short generation, which isn't timed")


def _write_summary(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    write_atomically(folder / SUMMARY_JSON, render_json(summary))
    return summary
