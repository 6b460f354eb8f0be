"""Experiments on Ray workers that each hold the model; only the driver writes files.

Ray is imported on first use, since runs in one process don't need it.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import platform
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, Self, cast

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
from bh_routing.experiments.run_log import SOURCES
from bh_routing.experiments.specs import ScoredSpec
from bh_routing.models.load import DEMO, DeviceName, DtypeName, load_model
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import QualityRecord
from bh_routing.rules.base import Rule

MAX_DEATHS: Final = 3
"""Worker deaths that fail a job, and, times the number of workers, that end a run if no worker
finishes anything in between."""
PATIENCE_SEC: Final = 30.0
"""Time without any worker after which a warning is logged."""
MOST_PER_GPU: Final = 8
"""Maximum number of workers that share a GPU."""
ROOM_FACTOR: Final = 1.25
ROOM_BYTES: Final = 2 * 2**30
"""GPU memory of a worker: ROOM_FACTOR times the weights' size, and ROOM_BYTES for activations,
logits and CUDA."""

log = logging.getLogger(__name__)


class Worker:
    """Actor in a worker's process: a model, and a serial executor for it.

    Its methods return their result and the records logged since the last call, since nobody reads a
    worker's console.
    """

    def __init__(self) -> None:
        self._serial: SerialExecutor | None = None
        self._records: SimpleQueue[logging.LogRecord] = SimpleQueue()
        logging.getLogger(SOURCES[0]).setLevel(logging.INFO)
        for name in SOURCES:
            logging.getLogger(name).addHandler(QueueHandler(self._records))

    def load(
        self, driver: RunIdentity, dtype: DtypeName, threads: int, calibration: Calibration | None
    ) -> tuple[bool, list[logging.LogRecord]]:
        """Load the model, and check that it is the driver's.

        Raises:
            InputError: the model can't be loaded, or results of this machine and the driver's
                can't be mixed.
        """
        torch.set_num_threads(threads)
        device = cast(DeviceName, driver.device_type)
        model, tokenizer = load_model(driver.model, device=device, dtype=dtype)
        if driver.chat_template is None:
            tokenizer = choose_chat_template(tokenizer, "off")
        if different := driver.differences(asdict(identify(driver.model, model, tokenizer))):
            raise InputError(
                f"results of a worker can't be mixed with the driver's ({'; '.join(different)}); "
                "give every machine the same files, versions and device"
            )
        self._serial = SerialExecutor(Subject(model, tokenizer, calibration))
        log.info("process %d on %s has the model", os.getpid(), platform.node())
        return True, self._logged()

    def run(self, cell: Cell, max_tokens: int) -> tuple[Experiment, list[logging.LogRecord]]:
        """Run one experiment."""
        assert self._serial is not None, "load comes first"
        [(_, experiment)] = self._serial.run([cell], max_tokens)
        return experiment, self._logged()

    def score(
        self,
        documents: Sequence[TokenizedDocument],
        rules: Mapping[str, Rule],
        settings: ScoreSettings,
    ) -> tuple[list[QualityRecord], list[logging.LogRecord]]:
        """Score a group of documents."""
        assert self._serial is not None, "load comes first"
        return list(self._serial.score(documents, rules, settings)), self._logged()

    def _logged(self) -> list[logging.LogRecord]:
        return [self._records.get() for _ in range(self._records.qsize())]


class RayExecutor(Executor):
    """An executor on workers of a Ray cluster.

    A worker that dies is replaced, and its job given to the next idle one; after `MAX_DEATHS`
    deaths the experiment is a failed row. Workers on one machine compete for its memory bandwidth,
    so their times may exceed those of a single worker.

    Args:
        spec: the model's name, which must denote the same model on every machine; cluster and
            number of workers.
        subject: the driver's model, which is moved off its GPU while workers run.
        threads: per worker, on a CPU.
    Raises:
        InputError: (on entering) the cluster can't be reached, or has no room for a worker.
    """

    def __init__(self, spec: ScoredSpec, subject: Subject, threads: int = 1) -> None:
        path = Path(spec.model).expanduser()
        # Workers have a different working directory.
        name = str(path.resolve()) if spec.model != DEMO and path.is_dir() else spec.model
        identity = identify(name, subject.model, subject.tokenizer)
        self._recipe: tuple[Any, ...] = (identity, spec.dtype, threads)
        self._subject = subject
        self._address, self._num_workers = spec.ray_address, spec.workers
        self._needs = _demand(subject.model, threads)
        self._exits = ExitStack()
        self._ray: Any = None
        self._calibration: Any = None
        self._actors: dict[int, Any] = {}
        self._idle: list[int] = []
        # By reference of the result: the worker, and its job or None while it loads the model.
        self._busy: dict[Any, tuple[int, int | None]] = {}
        self._deaths_in_a_row = 0  # without a model loaded or a job finished in between

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._ray = stack.enter_context(connected(self._address))
            room = count_room(self._needs, self._ray.cluster_resources(), self._num_workers or 1)
            self._num_workers = self._num_workers or room
            self._calibration = self._ray.put(self._subject.calibration)
            stack.enter_context(_parked(self._subject.model))
            stack.callback(self._stop_workers)
            self._exits = stack.pop_all()
        return self

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here; move the model back to its GPU."""
        self._exits.close()

    def run(self, cells: Sequence[Cell], max_tokens: int) -> Iterator[tuple[Cell, Experiment]]:
        """Yield experiments in order of completion."""
        for at, experiment in self._map("run", [(cell, max_tokens) for cell in cells]):
            problem = f"{MAX_DEATHS} workers died of it; run it alone without --executor ray"
            yield cells[at], experiment or give_up(cells[at], problem)

    def score(
        self,
        documents: Sequence[TokenizedDocument],
        rules: Mapping[str, Rule],
        settings: ScoreSettings,
    ) -> Iterator[QualityRecord]:
        """Yield records, group by group, in order of completion."""
        # The same groups as in a serial run: another batch would round differently.
        groups = list(document_groups(documents, settings.decode_batch))
        jobs = [(group, dict(rules), settings) for group in groups]
        for at, records in self._map("score", jobs):
            if records is None:
                raise ExperimentError(
                    f"{MAX_DEATHS} workers died scoring {groups[at][0].name!r} and what is "
                    "scored with it; try a smaller --batch-size, or no --executor ray"
                )
            yield from records

    def describe(self) -> dict[str, Any]:
        """Return the executor's entry in run.json."""
        return {
            "name": "ray",
            "version": self._ray.__version__,
            "address": self._address,
            "workers": self._num_workers,
            "each_takes": self._needs,
        }

    def _map(self, method: str, jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Call a worker's method for each job, in order, as workers become idle.

        Yields:
            The number of a job, and its result or None after `MAX_DEATHS` workers died of it.
        Raises:
            ExperimentError: workers keep dying.
            BHRoutingError: raised by a worker.
        """
        waiting, deaths = deque(range(len(jobs))), Counter[int | None]()

        def hand_out() -> None:
            while waiting and self._idle:
                number, job = self._idle.pop(), waiting.popleft()
                call = getattr(self._actors[number], method)
                self._busy[call.remote(*jobs[job])] = number, job

        if jobs and not self._actors:
            for number in range(1, min(self._num_workers or 1, len(jobs)) + 1):
                self._start_worker(number)
            log.info("%d Ray workers (%s each)", len(self._actors), _list(self._needs))
        while waiting or any(job is not None for _, job in self._busy.values()):
            hand_out()
            ready, _ = self._ray.wait(list(self._busy), timeout=PATIENCE_SEC)
            if not ready and all(job is None for _, job in self._busy.values()):
                log.warning("still waiting for a worker, which takes %s", _list(self._needs))
            for reference in ready:
                number, job = self._busy.pop(reference)
                result = self._receive(reference, number)
                if result is None:
                    deaths[job] += 1
                    self._start_worker(number)
                    if job is not None and deaths[job] < MAX_DEATHS:
                        waiting.appendleft(job)
                        continue
                else:
                    self._idle.append(number)
                    # Before the yield, so that the worker doesn't wait for the caller.
                    hand_out()
                if job is not None:
                    yield job, result

    def _receive(self, reference: Any, number: int) -> Any:
        """Return the result of a worker's method, and log its records; None: the worker died."""
        exceptions = self._ray.exceptions
        try:
            result, records = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            raise getattr(error, "cause", None) or error from error
        except exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            log.warning("worker %d died and is replaced: %s", number, reason)
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= MAX_DEATHS * len(self._actors):
                raise ExperimentError(
                    f"{self._deaths_in_a_row} workers died in a row, at most "
                    f"{self._deaths_in_a_row - 1} may (the last: {reason}); see Ray's logs, and "
                    "give workers more memory or take fewer with --workers"
                ) from error
            return None
        self._deaths_in_a_row = 0
        for record in records:
            if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
                record.msg = f"worker {number}: {record.msg}"
                logger.handle(record)
        return result

    def _start_worker(self, number: int) -> None:
        if number in self._actors:
            self._ray.kill(self._actors[number])
        self._actors[number] = self._ray.remote(Worker).options(**self._needs).remote()
        loading = self._actors[number].load.remote(*self._recipe, self._calibration)
        self._busy[loading] = number, None

    def _stop_workers(self) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors, self._idle, self._busy = {}, [], {}


def _demand(model: Any, threads: int) -> dict[str, float]:
    """Return a worker's resources: CPU threads, or a GPU or a fraction of one."""
    if model.device.type == "cpu":
        return {"num_cpus": threads}
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    total = torch.cuda.get_device_properties(0).total_memory
    return {"num_cpus": 1, "num_gpus": gpu_fraction(num_bytes, total)}


def gpu_fraction(model_bytes: int, gpu_bytes: int) -> float:
    """Return the fraction of a GPU that a worker requests: 1/n if n workers fit, at most 1.

    Example:
        >>> gpu_fraction(14 * 2**30, 80 * 2**30), gpu_fraction(60 * 2**30, 80 * 2**30)
        (0.25, 1.0)
    """
    num_fitting = int(gpu_bytes / (ROOM_FACTOR * model_bytes + ROOM_BYTES))
    return 1 / min(max(1, num_fitting), MOST_PER_GPU)


def count_room(needs: Mapping[str, float], resources: Mapping[str, float], wanted: int) -> int:
    """Return how many workers fit into a cluster.

    Args:
        needs: resources of a worker, by Ray's option: num_cpus, num_gpus.
        resources: the cluster's, by Ray's name: CPU, GPU.
        wanted: minimum number of workers.
    Raises:
        InputError: fewer fit.
    Example:
        >>> count_room({"num_cpus": 1, "num_gpus": 0.25}, {"CPU": 32, "GPU": 2}, wanted=1)
        8
    """
    has = {option: resources.get(option[4:-1].upper(), 0) for option in needs}
    room = min(math.floor(has[option] / needs[option] + 1e-9) for option in needs)
    if wanted > room:
        raise InputError(
            f"{wanted} workers were asked for (each takes {_list(needs)}), and Ray has "
            f"{_list(has)}: room for {room}; lower --workers, or give --ray-address of a larger "
            "cluster"
        )
    return room


def _list(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in amounts.items())


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


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to a Ray cluster, or start Ray on this machine, and yield the module.

    An existing connection is used and left open.

    Raises:
        InputError: the cluster can't be reached.
    """
    earlier = signal.getsignal(signal.SIGTERM)
    ray: Any = importlib.import_module("ray")
    is_ours = not ray.is_initialized()
    if is_ours:
        # No usage reports to Ray's developers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Otherwise Ray logs a deprecation warning at every start.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"no Ray cluster answers at {address or 'this machine'} ({reason}); start one "
                "with `ray start --head`, or leave --ray-address out"
            ) from error
    # Ray replaces the SIGTERM handler, and would end the process silently.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, earlier)
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()


def make_executor(spec: ScoredSpec, subject: Subject) -> Executor:
    """Return the executor that a spec names; entering it starts workers, if any."""
    if spec.executor == "local":
        return SerialExecutor(subject)
    return RayExecutor(spec, subject, choose_threads(subject.model).decode)
