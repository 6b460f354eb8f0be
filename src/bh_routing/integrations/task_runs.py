"""Run lm-eval tasks under several configurations, on the same items."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lm_eval
import yaml
from datasets.exceptions import DatasetsError
from lm_eval.tasks import TaskManager

from bh_routing.errors import InputError, unknown_name
from bh_routing.integrations.lm_eval import TASKS, ExpertUse, RoutedModel, task_folder
from bh_routing.models.load import LoadedModel
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import TaskOutcome
from bh_routing.rules.base import Rule

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
class TaskPlan:
    """Tasks, and the number of items."""

    tasks: Sequence[str] = TASKS
    """Names of tasks, groups or tags, or YAML files."""
    include_paths: Sequence[Path] = ()
    """Folders with further tasks; the packaged ones are always available."""
    limit: int | None = None
    """Maximum number of items per task, from its first; None: all."""
    num_fewshot: int | None = None
    """None: the task's own."""
    batch_size: int = 1


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
    """Results of one configuration on one entry of the plan's tasks."""

    config_name: str
    requested: str
    """The entry; a group or tag has several tasks."""
    scores: list[TaskScore]
    outcomes: list[TaskOutcome]
    expert_use: ExpertUse
    seconds: float


def run_tasks(
    loaded: LoadedModel,
    rules: Mapping[str, Rule],
    calibration: Calibration | None,
    plan: TaskPlan,
    known: TaskManager,
) -> Iterator[TaskRun]:
    """Run every task under every rule, task by task, to complete comparisons early.

    Args:
        loaded: model and tokenizer.
        rules: name -> rule.
        calibration: for rules that need one; None: each such rule calibrates.
        plan: the tasks.
        known: the plan's task manager, from `find_tasks`.
    Yields:
        One run per task and rule, as it is finished.
    Raises:
        InputError: a rule doesn't fit the model.
    """
    models = {
        name: RoutedModel(loaded, rule=rule, calibration=calibration, batch_size=plan.batch_size)
        for name, rule in rules.items()
    }
    for task in plan.tasks:
        for name, model in models.items():
            model.expert_use = ExpertUse()
            start = time.perf_counter()
            with _packaged_tasks_without_hint():
                results = _evaluate(model, task, known, plan)
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


def find_tasks(plan: TaskPlan) -> TaskManager:
    """Index the tasks, and load each once, to find errors before the model is loaded.

    lm-eval's own 14,000 tasks take half a minute, so they are indexed only if needed.

    Raises:
        InputError: a task or a folder doesn't exist or can't be loaded, or the plan has no task.
    """
    if not plan.tasks:
        raise InputError(f"no task was given; give at least one, such as {TASKS[0]}")
    for path in plan.include_paths:
        if not path.is_dir():
            raise InputError(f"task folder {path} doesn't exist; check --include-path")
    folders = [str(task_folder()), *(str(path) for path in plan.include_paths)]
    local = TaskManager(include_path=folders, include_defaults=False)
    manager = TaskManager(include_path=folders) if _unknown(plan, local) else local
    unknown = _unknown(plan, manager)
    if unknown:
        known = local.all_tasks
        raise InputError(
            f"{unknown_name('task', unknown[0], known)}; and what `lm-eval ls tasks` lists"
        )
    for task in plan.tasks:
        _check_task(task, manager)
    return manager


def _unknown(plan: TaskPlan, manager: TaskManager) -> list[str]:
    known = set(manager.all_tasks)
    return [task for task in plan.tasks if task not in known and not Path(task).is_file()]


def _check_task(task: str, manager: TaskManager) -> None:
    try:
        with _packaged_tasks_without_hint():
            manager.load([task])
    except _TASK_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"task {task!r} can't be loaded ({reason}); correct its file, or check its data set's "
            f"name and the network: {', '.join(TASKS)} need none"
        ) from error


def _evaluate(
    model: RoutedModel, task: str, manager: TaskManager, plan: TaskPlan
) -> dict[str, Any]:
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model,
        tasks=[task],
        num_fewshot=plan.num_fewshot,
        limit=plan.limit,
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
