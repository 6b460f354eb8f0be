"""Experiments on Ray workers that each hold the model; only the driver writes files."""

from __future__ import annotations

import logging
import math
import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import torch

from bh_routing.engine.generate import choose_chat_template
from bh_routing.engine.score import document_groups
from bh_routing.engine.windows import TokenizedDocument
from bh_routing.errors import ExperimentError, InputError
from bh_routing.experiments.executors import (
    Cell,
    Executor,
    ScoreSettings,
    SerialExecutor,
    choose_threads,
    give_up,
)
from bh_routing.experiments.experiment import Experiment, Subject, release_memory
from bh_routing.experiments.identity import RunIdentity, identify
from bh_routing.experiments.ray_pool import MAX_DEATHS, Answer, Job, WorkerPool, connected
from bh_routing.experiments.run_log import SOURCES
from bh_routing.experiments.specs import ScoredSpec
from bh_routing.models.load import DEMO, load_model
from bh_routing.models.routers import describe_model
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import QualityRecord
from bh_routing.rules.base import Rule

MOST_PROMPTS: Final = 8
"""Maximum experiments per job, the unit of progress and of loss when a worker dies."""
JOBS_A_WORKER: Final = 4
"""Minimum number of jobs per worker, so that none waits long for the last."""
ROOM_FACTOR: Final = 1.25
ROOM_BYTES: Final = 2 * 2**30
"""GPU memory of a worker: ROOM_FACTOR times the weights' size, and ROOM_BYTES for activations,
logits and CUDA."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class RaySettings:
    """Cluster, number and resources of the workers."""

    address: str | None = None
    """Address of a cluster, such as auto or host:6379; None: start Ray on this machine."""
    num_workers: int | None = None
    """None: as many as the cluster has room for, at most one per job."""
    threads: int = 1
    """Per worker, on a CPU."""


class Recipe(NamedTuple):
    """A worker's instructions to load the driver's model."""

    model: str
    dtype: str
    identity: RunIdentity
    """The driver's."""
    threads: int
    has_chat_template: bool
    """Whether the driver applies the tokenizer's chat template to prompts."""


class Worker:
    """Actor in a worker's process: a model, and a serial executor for it."""

    def __init__(self) -> None:
        self._serial: SerialExecutor | None = None

    def load(self, recipe: Recipe, calibration: Calibration | None) -> Answer:
        """Load the model, and check that it is the driver's.

        Raises:
            InputError: the model differs or can't be loaded, or results of this machine and the
                driver's can't be mixed.
        """
        torch.set_num_threads(recipe.threads)
        with _collected() as lines:
            device: Any = recipe.identity.device_type
            dtype: Any = recipe.dtype
            model, tokenizer = load_model(recipe.model, device=device, dtype=dtype)
            if not recipe.has_chat_template:
                tokenizer = choose_chat_template(tokenizer, "off")
            own = identify(recipe.identity.model, model, tokenizer)
            if different := recipe.identity.differences(asdict(own)):
                raise InputError(
                    f"results of a worker can't be mixed with the driver's ({'; '.join(different)}"
                    "); give every machine the same files, versions and device"
                )
            self._serial = SerialExecutor(Subject(model, tokenizer, calibration))
            log.info("process %d on %s has the model", os.getpid(), platform.node())
        return Answer([], lines)

    def run(self, cells: Sequence[Cell], max_tokens: int) -> Answer:
        """Run experiments, one after another."""
        assert self._serial is not None, "load comes first"
        with _collected() as lines:
            return Answer([done for _, done in self._serial.run(cells, max_tokens)], lines)

    def score(
        self,
        groups: Sequence[Sequence[TokenizedDocument]],
        rules: Mapping[str, Rule],
        settings: ScoreSettings,
    ) -> Answer:
        """Score groups of documents; the answer has one list of records per group."""
        assert self._serial is not None, "load comes first"
        with _collected() as lines:
            records = [list(self._serial.score(group, rules, settings)) for group in groups]
            return Answer(records, lines)


class RayExecutor:
    """An `Executor` on workers of a Ray cluster.

    A worker that dies is replaced and its job retried; after `MAX_DEATHS` deaths the experiment is
    a failed row. Workers on one machine compete for its memory bandwidth, so their times may exceed
    those of a single worker.

    Args:
        model: name for `load_model`, which must denote the same model on every machine.
        dtype: as for `load_model`.
        subject: the driver's model, which is moved off its GPU while workers run.
        settings: cluster, number and resources of the workers.
    Raises:
        InputError: (on entering) Ray isn't installed, or the cluster has no room for a worker.
    """

    def __init__(self, model: str, dtype: str, subject: Subject, settings: RaySettings) -> None:
        self._subject = subject
        self._settings = settings
        self._facts = describe_model(subject.model)
        self._bytes = sum(p.numel() * p.element_size() for p in subject.model.parameters())
        path = Path(model).expanduser()
        # Workers have a different working directory.
        name = str(path.resolve()) if model != DEMO and path.is_dir() else model
        identity = identify(model, subject.model, subject.tokenizer)
        self._recipe = Recipe(
            name, dtype, identity, settings.threads, bool(subject.tokenizer.chat_template)
        )
        self._exits = ExitStack()
        self._ray: Any = None
        self._pool: WorkerPool | None = None
        self._needs: dict[str, float] = {}
        self._room = 0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._ray = stack.enter_context(connected(self._settings.address))
            self._needs = self._demand()
            self._room = self._count_room(self._ray.cluster_resources())
            stack.enter_context(_parked(self._subject.model))
            stack.callback(self._close_pool)
            self._exits = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here; move the model back to its GPU."""
        self._exits.close()

    def run(self, cells: Sequence[Cell], max_tokens: int) -> Iterator[tuple[Cell, Experiment]]:
        """Yield experiments in order of completion."""
        if not cells:
            return
        pool = self._workers(len(cells))
        for job, results in pool.map(cut_blocks(cells, max_tokens, self._size(len(cells)))):
            if results is None:
                problem = f"{MAX_DEATHS} workers died of it; run it alone without --executor ray"
                results = [give_up(cell, problem) for cell in job.items]
            yield from zip(job.items, results, strict=True)

    def score(
        self,
        documents: Sequence[TokenizedDocument],
        rules: Mapping[str, Rule],
        settings: ScoreSettings,
    ) -> Iterator[QualityRecord]:
        """Yield records, group by group, in order of completion."""
        # The same groups as in a serial run: another batch would round differently.
        groups = list(document_groups(documents, settings.decode_batch))
        if not groups:
            return
        jobs = [
            Job(method="score", items=(group,), settings=(dict(rules), settings))
            for group in groups
        ]
        for job, results in self._workers(len(jobs)).map(jobs):
            if results is None:
                raise ExperimentError(
                    f"{MAX_DEATHS} workers died scoring {job.items[0][0].name!r} and what is "
                    "scored with it; try a smaller --batch-size, or no --executor ray"
                )
            for records in results:
                yield from records

    def describe(self) -> dict[str, Any]:
        """Return the executor's entry in run.json."""
        return {
            "name": "ray",
            "version": self._ray.__version__,
            "address": self._settings.address,
            "workers": self._settings.num_workers or self._room,
            "each_takes": self._needs,
        }

    def _demand(self) -> dict[str, float]:
        """Return a worker's resources: CPU threads, or a GPU or a fraction of one."""
        if self._facts.device == "cpu":
            return {"num_cpus": self._settings.threads, "num_gpus": 0}
        total = torch.cuda.get_device_properties(0).total_memory
        return {"num_cpus": 1, "num_gpus": gpu_fraction(self._bytes, total)}

    def _count_room(self, resources: Mapping[str, float]) -> int:
        """Return how many workers fit; raise InputError if fewer than requested."""
        needs = {"CPU": self._needs["num_cpus"], "GPU": self._needs["num_gpus"]}
        room = min(
            math.floor(resources.get(name, 0) / amount + 1e-9)
            for name, amount in needs.items()
            if amount
        )
        wanted = self._settings.num_workers or 1
        if wanted > room:
            has = ", ".join(f"{resources.get(name, 0):g} {name}" for name in needs)
            each = ", ".join(f"{amount:g} {name}" for name, amount in needs.items() if amount)
            raise InputError(
                f"{wanted} workers were asked for (each takes {each}), and Ray has {has}: room "
                f"for {room}; lower --workers, or give --ray-address of a larger cluster"
            )
        return room

    def _size(self, num_jobs: int) -> int:
        return min(self._settings.num_workers or self._room, num_jobs)

    def _workers(self, num_jobs: int) -> WorkerPool:
        """Return the pool; the first call starts its workers, at most one per job."""
        if self._pool is not None:
            return self._pool
        ray, size = self._ray, self._size(num_jobs)
        calibration = ray.put(self._subject.calibration)
        actor_class = ray.remote(Worker).options(**self._needs)

        def start() -> tuple[Any, Any]:
            actor = actor_class.remote()
            return actor, actor.load.remote(self._recipe, calibration)

        needs = ", ".join(f"{name} {amount:g}" for name, amount in self._needs.items() if amount)
        log.info("%d Ray workers (%s each)", size, needs)
        self._pool = WorkerPool(ray, start, size, f"a worker that takes {needs}")
        return self._pool

    def _close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def gpu_fraction(model_bytes: int, gpu_bytes: int) -> float:
    """Return the fraction of a GPU that a worker requests: 1/n if n workers fit, at most 1.

    Example:
        >>> gpu_fraction(14 * 2**30, 80 * 2**30), gpu_fraction(60 * 2**30, 80 * 2**30)
        (0.25, 1.0)
    """
    num_fitting = int(gpu_bytes / (ROOM_FACTOR * model_bytes + ROOM_BYTES))
    return 1 / min(max(1, num_fitting), MOST_PROMPTS)


def cut_blocks(cells: Sequence[Cell], max_tokens: int, num_workers: int) -> list[Job]:
    """Split each configuration's cells into blocks of prompts."""
    size = max(1, min(MOST_PROMPTS, len(cells) // (JOBS_A_WORKER * num_workers)))
    by_config: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_config[cell.named_rule.name].append(cell)
    return [
        Job(method="run", items=tuple(mine[at : at + size]), settings=(max_tokens,), group=name)
        for name, mine in by_config.items()
        for at in range(0, len(mine), size)
    ]


@contextmanager
def _parked(model: Any) -> Iterator[None]:
    """Move a model off its GPU inside the block, to make room for workers."""
    device = model.device
    if device.type == "cpu":
        yield
        return
    model.to("cpu")
    release_memory()
    try:
        yield
    finally:
        model.to(device)


class _Collector(logging.Handler):
    def __init__(self, lines: list[tuple[str, int, str]]) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append((record.name, record.levelno, record.getMessage()))


@contextmanager
def _collected() -> Iterator[list[tuple[str, int, str]]]:
    """Collect log records inside the block, since nobody reads a worker's console."""
    lines: list[tuple[str, int, str]] = []
    handler = _Collector(lines)
    loggers = [logging.getLogger(name) for name in SOURCES]
    loggers[0].setLevel(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def make_executor(spec: ScoredSpec, subject: Subject) -> Executor:
    """Return the executor that a spec names; entering it starts workers, if any."""
    if spec.executor == "local":
        return SerialExecutor(subject)
    settings = RaySettings(
        address=spec.ray_address,
        num_workers=spec.workers,
        threads=choose_threads(subject.model).decode,
    )
    return RayExecutor(spec.model, spec.dtype, subject, settings)
