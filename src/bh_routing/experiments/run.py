"""A complete run: checks, experiments, scoring, timing, analysis and reports."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bh_routing.engine.decode import startup_seconds
from bh_routing.engine.score import check_steps
from bh_routing.errors import BHRoutingError
from bh_routing.experiments.budget import command_of, find_alternatives, losing_budgets
from bh_routing.experiments.calibrating import check_held_out, describe_nulls, save_calibration
from bh_routing.experiments.configurations import find_baseline, make_rules, resolved
from bh_routing.experiments.executors import Executor, run_grid, torch_threads
from bh_routing.experiments.experiment import Attempts, Subject
from bh_routing.experiments.identity import collect_provenance, device_name, peak_memory_bytes
from bh_routing.experiments.preparation import (
    Preparation,
    fit_to_config,
    fit_to_loaded,
    load,
    prepare,
)
from bh_routing.experiments.quality import score_with_references, scored_documents
from bh_routing.experiments.ray_executor import make_executor
from bh_routing.experiments.run_log import FILE_ONLY, RunLog
from bh_routing.experiments.spec_errors import shorten
from bh_routing.experiments.specs import RunSpec
from bh_routing.experiments.store import ResultStore
from bh_routing.experiments.timing_rounds import write_timing_rounds
from bh_routing.experiments.token_traces import write_token_traces
from bh_routing.results.records import (
    ALTERNATIVES,
    BASELINE,
    LEFT_OUT,
    LOG,
    STATUS_OK,
    ExperimentRecord,
    QualityRecord,
)
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import make_rule
from bh_routing.rules.fixed import TopK

log = logging.getLogger(__name__)

Conclude = Callable[[Path, Callable[[str, Callable[[], Any]], Any]], Any]
"""Analyses and reports a folder, each step by a function like `Attempts`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOutcome:
    """Outcome of a run."""

    folder: Path
    records: tuple[ExperimentRecord, ...]
    """One row per experiment of the spec, in the CSV's order."""
    num_run: int
    """Number of experiments run now."""
    num_reused: int
    """Number of experiments finished by an earlier run of the folder."""
    problems: tuple[str, ...]
    """One sentence per failed experiment and failed later step."""
    concluded: Any = None
    """Return value of `conclude`: the results as they were read for the report."""

    @property
    def exit_code(self) -> int:
        """0 if everything succeeded, else 1."""
        return 1 if self.problems else 0

    def to_document(self) -> dict[str, Any]:
        """Return plain data, with each configuration's mean experts per token."""
        experts: dict[str, list[float]] = {}
        for record in self.records:
            if record.status == STATUS_OK:
                experts.setdefault(record.config_name, []).append(record.avg_experts_per_token)
        return {
            "folder": str(self.folder),
            "exit_code": self.exit_code,
            "experiments": len(self.records),
            "run_now": self.num_run,
            "reused": self.num_reused,
            "problems": list(self.problems),
            "mean_experts": {name: sum(means) / len(means) for name, means in experts.items()},
        }


def run(spec: RunSpec, conclude: Conclude | None = None) -> RunOutcome:
    """Run every configuration on every prompt, and store each result as soon as it is finished.

    A stopped run resumes where it stopped; failed experiments are retried. Finished experiments are
    never run twice and never lost.

    Args:
        spec: the run's spec.
        conclude: analyses and reports the results; None: neither.
    Returns:
        The rows and a sentence per failure.
    Raises:
        InputError: the spec, model, calibration or folder can't be used; nothing was written.
        KeyboardInterrupt: the run was interrupted; finished experiments are kept.
    """
    start = time.perf_counter()
    with (
        RunLog() as run_log,
        ResultStore(
            spec.output, resume=spec.resume, checkpoint_interval=spec.checkpoint_interval
        ) as store,
    ):
        fitted = fit_to_config(spec)
        if not spec.no_eval:
            rules = make_rules(fitted.spec.configs, spec.budget)
            check_steps((named.rule for named in rules), spec.decode_batch)
            check_held_out(spec, rules, scored_documents(spec))
        loaded = load(fitted.spec)
        spec, left_out = fit_to_loaded(fitted, loaded.model)
        with torch_threads(loaded.threads.decode):
            prepared = prepare(spec, store, loaded)
            keys = [cell.key for cell in prepared.grid]
            with make_executor(spec, prepared.subject) as executor:
                document = _document(spec, prepared, store) | {
                    "executor": executor.describe(),
                    LEFT_OUT: left_out,
                }
                store.begin(prepared.identity, document, keys)
                run_log.write_to(spec.output / LOG)
                try:
                    return _run_begun(spec, prepared, executor, store, conclude, start)
                except KeyboardInterrupt:
                    _say_how_to_go_on(spec, prepared, store)
                    raise
                except BHRoutingError as error:
                    log.error("%s", error, extra=FILE_ONLY)
                    raise


def _run_begun(
    spec: RunSpec,
    prepared: Preparation,
    executor: Executor,
    store: ResultStore,
    conclude: Conclude | None,
    start: float,
) -> RunOutcome:
    """Carry out a run whose folder is open for writing."""
    grid, folder = prepared.grid, spec.output
    if prepared.subject.calibration is not None:
        save_calibration(prepared.subject.calibration, folder)
    _announce(spec, prepared, store)
    # For experiments from an earlier session only their own time is known.
    earlier_sec = sum(r.inference_time_sec for r in store.records if r.status == STATUS_OK)
    grid_start = time.perf_counter()
    num_run = run_grid(executor, grid, spec.max_tokens, store)
    store.flush()
    failures = [
        f"{record.config_name} on {shorten(record.prompt_text)!r} failed: {record.error}"
        for record in store.records
        if record.status != STATUS_OK
    ]
    quality_start = time.perf_counter()
    attempt = Attempts()
    records = _score(prepared, executor, store, attempt)
    attempt(
        "the comparison with bh_drop",
        lambda: _score_alternatives(spec, prepared, store, records),
    )
    rounds_start = time.perf_counter()
    attempt("interleaved timing", lambda: _time_interleaved(spec, prepared, store))
    traces_start = time.perf_counter()
    attempt("tracing tokens", lambda: _trace_tokens(spec, prepared))
    timing = {
        "load_sec": prepared.loaded.seconds,
        "calibrate_sec": prepared.calibrate_sec,
        "startup_sec": startup_seconds(prepared.subject.model),
        "experiments_sec": earlier_sec + quality_start - grid_start,
        "timing_rounds_sec": traces_start - rounds_start,
        "token_traces_sec": time.perf_counter() - traces_start,
        "quality_sec": rounds_start - quality_start if prepared.ledger else None,
        "total_sec": earlier_sec + time.perf_counter() - start,
    }
    peak = peak_memory_bytes(prepared.subject.model.device)
    store.update_document({"timing": timing, "peak_memory_bytes": peak})
    concluded = _conclude(conclude, folder, attempt)
    timing["total_sec"] = earlier_sec + time.perf_counter() - start
    store.update_document({"timing": timing})
    problems = (*failures, *attempt.problems)
    for problem in problems:
        log.error("%s", problem)
    _say_the_end(store, len(grid), num_run, time.perf_counter() - start)
    return RunOutcome(
        folder=folder,
        records=tuple(store.records),
        num_run=num_run,
        num_reused=len(grid) - num_run,
        problems=problems,
        concluded=concluded,
    )


def _conclude(conclude: Conclude | None, folder: Path, attempt: Attempts) -> Any:
    if conclude is None:
        return None
    log.info("comparing, drawing the plots and writing the report")
    return conclude(folder, attempt)


def _score(
    prepared: Preparation, executor: Executor, store: ResultStore, attempt: Attempts
) -> list[QualityRecord]:
    """Score quality if the spec asks for it; return the records, empty if there are none.

    Closes the executor: the model is needed in this process from here on.
    """
    if prepared.ledger is None:
        executor.close()
        return []
    rules = {named.name: named.rule for named in prepared.rules}
    scored = attempt(
        "scoring",
        lambda: _score_into(prepared, prepared.subject, rules, executor),
    )
    executor.close()
    names = dict.fromkeys(record.config_name for record in scored or ())
    store.update_document({"quality": {"configs": list(names)}})
    return scored or []


def _score_into(
    prepared: Preparation,
    subject: Subject,
    rules: Mapping[str, Rule],
    executor: Executor | None = None,
) -> list[QualityRecord]:
    assert prepared.ledger is not None, "there is text to score"
    with torch_threads(prepared.loaded.threads.batch), prepared.ledger as ledger:
        return score_with_references(subject, ledger, rules, executor)


def _score_alternatives(
    spec: RunSpec,
    prepared: Preparation,
    store: ResultStore,
    records: Sequence[QualityRecord],
) -> None:
    """Score `bh_drop` next to BH rules worse than static top-k; note each rule's command."""
    if not records:
        return
    rules = {record.config_name: make_rule(record.rule) for record in records}
    budgets = losing_budgets(prepared.rules, records, prepared.loaded.facts.model_top_k)
    skipped: str | None = None
    found: list[dict[str, Any]] = []
    if budgets:
        log.info("scoring bh_drop at the mean experts of BH configurations, for comparison")
        try:
            with torch_threads(prepared.loaded.threads.batch):
                subject, alternatives, calibration = find_alternatives(
                    spec, budgets, rules, prepared.subject, store.document
                )
                added = {entry["config_name"]: make_rule(entry["config"]) for entry in alternatives}
            records = _score_into(prepared, subject, rules | added)
            names = [n for n in dict.fromkeys(r.config_name for r in records) if n not in added]
            store.update_document({"calibration": calibration, "quality": {"configs": names}})
            rules, found = rules | added, alternatives
        except (BHRoutingError, RuntimeError) as error:
            # Models lack gradients or memory in many ways, and nothing requested depends on it.
            skipped = " ".join(str(error).split())
            log.warning("bh_drop isn't scored for comparison: %s", skipped)
    own = TopK(prepared.loaded.facts.model_top_k)
    commands = {name: command_of(spec, rule, own) for name, rule in rules.items()}
    document = {"rules": found, "skipped": skipped, "commands": commands}
    store.update_document({ALTERNATIVES: document})


def _trace_tokens(spec: RunSpec, prepared: Preparation) -> None:
    with torch_threads(prepared.loaded.threads.batch):
        write_token_traces(spec.output, prepared.subject, prepared.grid, spec.token_traces)


def _time_interleaved(spec: RunSpec, prepared: Preparation, store: ResultStore) -> None:
    write_timing_rounds(
        store.folder,
        prepared.subject,
        [cell for cell in prepared.grid if store.finished_record(cell.key) is not None],
        num_rounds=spec.timing_rounds,
        max_tokens=spec.max_tokens,
        seed=spec.seed,
    )


def _document(spec: RunSpec, prepared: Preparation, store: ResultStore) -> dict[str, Any]:
    """Return the content of run.json before the first experiment."""
    facts = prepared.loaded.facts
    stored = store.stored.document if store.stored is not None else {}
    threads = prepared.loaded.threads
    provenance = {
        **collect_provenance(spec.seed),
        "threads": threads.decode,
        "batch_threads": threads.batch,
    }
    return {
        "schema_version": prepared.identity.schema_version,
        "spec": resolved(spec, prepared.rules),
        "model": {
            "name": spec.model,
            **asdict(facts),
            "device_name": device_name(prepared.subject.model.device),
        },
        BASELINE: find_baseline(prepared.rules, facts.model_top_k),
        "budget": prepared.budget,
        "calibration": prepared.calibration_document or stored.get("calibration"),
        "nulls": describe_nulls(
            prepared.rules,
            num_experts=facts.num_experts,
            model_top_k=facts.model_top_k,
            seed=spec.seed,
        ),
        "provenance": provenance,
        "sessions": [*stored.get("sessions", []), {**provenance, "batch_size": spec.batch_size}],
        "quality": stored.get("quality"),
        ALTERNATIVES: stored.get(ALTERNATIVES),
        "timing": stored.get("timing"),
        "peak_memory_bytes": stored.get("peak_memory_bytes"),
    }


def _announce(spec: RunSpec, prepared: Preparation, store: ResultStore) -> None:
    num_reused = sum(store.finished_record(cell.key) is not None for cell in prepared.grid)
    log.info(
        "%d configurations on %d prompts, at most %d tokens each, into %s",
        len(prepared.rules),
        len(spec.prompts),
        spec.max_tokens,
        spec.output,
    )
    if num_reused:
        log.info(
            "resuming the run in %s: %d of %d experiments are finished already",
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


def _say_how_to_go_on(spec: RunSpec, prepared: Preparation, store: ResultStore) -> None:
    log.warning(
        "interrupted: %d of %d experiments are finished and kept in %s; the same command continues "
        "from there",
        sum(record.status == STATUS_OK for record in store.records),
        len(prepared.grid),
        spec.output,
    )


def _say_the_end(store: ResultStore, planned: int, num_run: int, seconds: float) -> None:
    done = sum(record.status == STATUS_OK for record in store.records)
    log.info(
        "%d of %d experiments are finished (%d tried now) after %.1f s; see %s",
        done,
        planned,
        num_run,
        seconds,
        store.folder,
    )
