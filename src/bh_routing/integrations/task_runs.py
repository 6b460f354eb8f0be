"""Run lm-eval tasks under several configurations, on the same items."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import lm_eval
import yaml
from datasets.exceptions import DatasetsError
from lm_eval.tasks import TaskManager

from bh_routing.engine.generate import choose_chat_template
from bh_routing.errors import InputError, ResultsError, unknown_name
from bh_routing.experiments.budget import bring_to_budget
from bh_routing.experiments.calibrating import obtain_calibration
from bh_routing.experiments.configurations import NamedRule, make_rules, resolved
from bh_routing.experiments.defaults import LOCAL_TASKS
from bh_routing.experiments.identity import collect_provenance
from bh_routing.experiments.preparation import fit_to_config, fit_to_loaded
from bh_routing.experiments.specs import LmEvalSpec
from bh_routing.integrations.lm_eval import ExpertUse, RoutedModel, check_end_token, task_folder
from bh_routing.models.load import LoadedModel, load_model
from bh_routing.models.routers import describe_model
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.files import render_json, render_json_lines, to_strict, write_atomically
from bh_routing.results.records import SCHEMA_VERSION, TASK_OUTCOMES, TASK_SUMMARY, TaskOutcome
from bh_routing.rules.base import Rule
from bh_routing.rules.fixed import TopK

log = logging.getLogger(__name__)

_TASK_ERRORS: Final = (
    AssertionError,
    AttributeError,
    DatasetsError,
    ImportError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
    yaml.YAMLError,
)
"""Errors of lm-eval for an invalid or unreachable task file or data set."""
_STANDARD_ERROR: Final = "_stderr"
_WEIGHTED: Final = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics whose items have a log-likelihood and a number of words or bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """One score of lm-eval's own table."""

    task: str
    filter: str
    metric: str
    value: float
    num_items: int
    version: str
    """Of the task; scores of different versions aren't comparable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRun:
    """Results of one configuration on one entry of the spec's tasks."""

    config_name: str
    requested: str
    """The entry; a group or tag has several tasks."""
    scores: list[TaskScore]
    outcomes: list[TaskOutcome]
    expert_use: ExpertUse
    seconds: float


def evaluate_tasks(
    spec: LmEvalSpec, compare: Callable[[list[TaskOutcome], str], list[Any]]
) -> dict[str, Any]:
    """Run tasks under each configuration, and compare it with the model's own top-k.

    Outcomes are written as they arrive, so that an interruption doesn't lose them.

    Args:
        spec: the spec; without an output folder nothing is kept.
        compare: outcomes and the name of the reference -> dataclasses for the summary.
    Returns:
        The content of lm_eval.json.
    Raises:
        InputError: a task, the model, calibration or a configuration can't be used, or no
            configuration is the model's own top-k.
        ResultsError: the folder holds outcomes already.
    """
    _check_output(spec.output)
    known = find_tasks(spec)
    fitted = fit_to_config(spec)
    loaded = load_model(
        spec.model, device=spec.device, dtype=spec.dtype, device_map=spec.device_map
    )
    check_end_token(loaded.tokenizer)
    loaded = loaded._replace(tokenizer=choose_chat_template(loaded.tokenizer, spec.chat_template))
    facts = describe_model(loaded.model)
    spec, left_out = fit_to_loaded(fitted, loaded.model)
    rules = make_rules(spec.configs, spec.budget)
    _say_what_steps_cannot_show(rules)
    reference = _reference(rules, facts.model_top_k)
    calibration, about = obtain_calibration(spec, rules, loaded.model, loaded.tokenizer)
    rules, _ = bring_to_budget(spec, rules, loaded.model, loaded.tokenizer, calibration)
    if spec.output is not None:
        spec.output.mkdir(parents=True, exist_ok=True)
    runs = []
    by_name = {named.name: named.rule for named in rules}
    for run in run_tasks(loaded, by_name, calibration, spec, known):
        runs.append(run)
        _append(spec.output, run)
    comparisons = compare([outcome for run in runs for outcome in run.outcomes], reference)
    document: dict[str, Any] = to_strict(
        {
            "model": {"name": spec.model, **asdict(facts)},
            "configs": resolved(spec, rules)["configs"],
            "left_out": left_out,
            "reference": reference,
            "calibration": about,
            "tasks": spec.tasks,
            "limit": spec.limit,
            "num_fewshot": spec.num_fewshot,
            "batch_size": spec.batch_size,
            "chat_template": loaded.tokenizer.chat_template,
            "runs": [_run_facts(run) for run in runs],
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "provenance": {
                **collect_provenance(spec.seed),
                "lm_eval": metadata.version("lm_eval"),
            },
        }
    )
    if spec.output is not None:
        write_atomically(spec.output / TASK_SUMMARY, render_json(document))
    return document


def _say_what_steps_cannot_show(rules: Sequence[NamedRule]) -> None:
    for named in rules:
        if named.rule.unit == "step":
            log.warning(
                "%s decides by decode step: in tasks scored by log-likelihood, which run as "
                "prefill, it drops nothing; only generated answers show its effect",
                named.name,
            )


def _reference(rules: Sequence[NamedRule], model_top_k: int) -> str:
    own = [named.name for named in rules if named.rule == TopK(model_top_k)]
    if not own:
        raise InputError(
            f"none of {', '.join(named.name for named in rules)} is the model's own top-k "
            f"(k = {model_top_k}), with which the others are compared; add such a configuration"
        )
    return own[0]


def _check_output(output: Path | None) -> None:
    """Raise ResultsError if the folder has outcomes, which mustn't be mixed with this run's."""
    for name in (TASK_OUTCOMES, TASK_SUMMARY):
        if output is not None and (output / name).exists():
            raise ResultsError(
                f"{output / name} already exists; choose another folder, or move it away"
            )


def _append(output: Path | None, run: TaskRun) -> None:
    if output is None:
        return
    path = output / TASK_OUTCOMES
    lines = render_json_lines(
        {"schema_version": SCHEMA_VERSION, **asdict(outcome)} for outcome in run.outcomes
    )
    # Whole, so that a run that is killed leaves no incomplete line.
    write_atomically(path, (path.read_bytes() if path.exists() else b"") + lines)


def _run_facts(run: TaskRun) -> dict[str, Any]:
    return {
        "config_name": run.config_name,
        "requested": run.requested,
        "mean_experts": run.expert_use.mean_experts,
        "tokens": run.expert_use.tokens,
        "seconds": round(run.seconds, 2),
        "scores": [asdict(score) for score in run.scores],
    }


def run_tasks(
    loaded: LoadedModel,
    rules: Mapping[str, Rule],
    calibration: Calibration | None,
    spec: LmEvalSpec,
    known: TaskManager,
) -> Iterator[TaskRun]:
    """Run every task under every rule, task by task, to complete comparisons early.

    Args:
        loaded: model and tokenizer.
        rules: name -> rule.
        calibration: for rules that need one; None: each such rule calibrates.
        spec: the tasks.
        known: the spec's task manager, from `find_tasks`.
    Yields:
        One run per task and rule, as it is finished.
    Raises:
        InputError: a rule doesn't fit the model.
    """
    models = {
        name: RoutedModel(loaded, rule=rule, calibration=calibration, batch_size=spec.batch_size)
        for name, rule in rules.items()
    }
    for task in spec.tasks:
        for name, model in models.items():
            model.expert_use = ExpertUse()
            start = time.perf_counter()
            with _packaged_tasks_without_hint():
                results = _evaluate(model, task, known, spec)
            seconds = time.perf_counter() - start
            mean = model.expert_use.mean_experts
            log.info("%s under %s: %.2f experts, %.1f s", task, name, mean, seconds)
            yield TaskRun(
                config_name=name,
                requested=task,
                scores=list(_scores(results)),
                outcomes=list(_outcomes(name, results)),
                expert_use=model.expert_use,
                seconds=seconds,
            )


def find_tasks(spec: LmEvalSpec) -> TaskManager:
    """Index the tasks, and load each once, to find errors before the model is loaded.

    lm-eval's own 14,000 tasks take half a minute, so they are indexed only if needed.

    Raises:
        InputError: a task or a folder doesn't exist or can't be loaded, or the spec has no task.
    """
    if not spec.tasks:
        raise InputError(f"no task was given; give at least one, such as {LOCAL_TASKS[0]}")
    for path in spec.include_paths:
        if not path.is_dir():
            raise InputError(f"task folder {path} doesn't exist; check the path")
    folders = [str(task_folder()), *(str(path) for path in spec.include_paths)]
    local = TaskManager(include_path=folders, include_defaults=False)
    manager = TaskManager(include_path=folders) if _unknown(spec, local) else local
    unknown = _unknown(spec, manager)
    if unknown:
        known = local.all_tasks
        raise InputError(
            f"{unknown_name('task', unknown[0], known)}; and what `lm-eval ls tasks` lists"
        )
    for task in spec.tasks:
        _check_task(task, manager)
    return manager


def _unknown(spec: LmEvalSpec, manager: TaskManager) -> list[str]:
    known = set(manager.all_tasks)
    return [task for task in spec.tasks if task not in known and not Path(task).is_file()]


def _check_task(task: str, manager: TaskManager) -> None:
    try:
        with _packaged_tasks_without_hint():
            manager.load([task])
    except _TASK_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"task {task!r} can't be loaded ({reason}); correct its file, or check its data set's "
            f"name and the network: {', '.join(LOCAL_TASKS)} need none"
        ) from error


def _evaluate(
    model: RoutedModel, task: str, manager: TaskManager, spec: LmEvalSpec
) -> dict[str, Any]:
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model,
        tasks=[task],
        num_fewshot=spec.num_fewshot,
        limit=spec.limit,
        # Configurations are compared item by item; lm-eval's errors treat each separately.
        bootstrap_iters=0,
        task_manager=manager,
        apply_chat_template=bool(model.tokenizer.chat_template),
    )
    return results


def _scores(results: Mapping[str, Any]) -> Iterator[TaskScore]:
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if comma and isinstance(value, float | int) and not metric.endswith(_STANDARD_ERROR):
                yield TaskScore(
                    task=task,
                    filter=filter_name,
                    metric=metric,
                    value=float(value),
                    num_items=int(values.get("sample_len", 0)),
                    version=str(results["versions"].get(task, "")),
                )


def _outcomes(config_name: str, results: Mapping[str, Any]) -> Iterator[TaskOutcome]:
    for task, samples in results["samples"].items():
        for sample in samples:
            values = {name: _plain(name, sample[name]) for name in sample["metrics"]}
            yield TaskOutcome(
                config_name=config_name,
                task=task,
                filter=sample["filter"],
                item=int(sample["doc_id"]),
                item_hash=sample["doc_hash"],
                # Not only the number, which may be the name of another item's cluster.
                cluster=str(sample["doc"].get("cluster", f"item {sample['doc_id']}")),
                metrics={name: value for name, value in values.items() if value is not None},
            )


def _plain(metric: str, value: Any) -> float | list[float] | None:
    """Return a finite number, or a sum and its weight; None for other values."""
    if metric in _WEIGHTED:
        return [float(part) for part in value]
    # Other pairs are answers, such as the true and the predicted class of an F1 score.
    is_number = isinstance(value, bool | int | float) and math.isfinite(value)
    return float(value) if is_number else None


@contextmanager
def _packaged_tasks_without_hint() -> Iterator[None]:
    """Suppress lm-eval's advice on arguments of custom data sets."""

    def is_other(record: logging.LogRecord) -> bool:
        return "Custom kwargs can be passed" not in record.getMessage()

    logger = logging.getLogger("lm_eval.api.task")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
