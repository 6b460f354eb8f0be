"""A pool of Ray workers that share a queue of jobs; a dead worker's job is retried by another.

Ray is imported on first use, since runs in one process don't need it.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from bh_routing.errors import ExperimentError, InputError

MAX_DEATHS: Final = 3
"""Worker deaths that fail a job, and, times the pool's size, consecutive deaths that end a run."""
PATIENCE_SEC: Final = 30.0
"""Time without any worker after which a warning is logged."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """A call of a worker's method with items, then settings; the answer has one result per item."""

    method: str
    items: tuple[Any, ...]
    settings: tuple[Any, ...] = ()
    group: str = ""
    """Workers prefer jobs of their last job's group, for which they are warmed up."""
    deaths: int = 0
    """Number of workers that died during this job."""

    def retried(self) -> list[Job]:
        """Return the jobs to retry after a death: one per item, to isolate the fatal one."""
        return [replace(self, items=(item,), deaths=self.deaths + 1) for item in self.items]


@dataclass(frozen=True, slots=True)
class Answer:
    """Return value of a worker's method."""

    results: list[Any]
    """One per item."""
    log: list[tuple[str, int, str]]
    """Logger, level and message of each record logged during the call."""


@dataclass(eq=False, slots=True)
class _Worker:
    """One worker, and the group of its last job."""

    number: int
    actor: Any
    group: str = ""


class JobQueue:
    """Waiting jobs, by group."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = list(jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def take(self, group: str) -> Job:
        """Remove and return a job of this group, or else the first of the group with most jobs."""
        waiting = Counter(job.group for job in self._jobs)
        wanted = group if group in waiting else max(waiting, key=waiting.__getitem__)
        place = next(i for i, job in enumerate(self._jobs) if job.group == wanted)
        return self._jobs.pop(place)

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Put jobs at the front of the queue."""
        self._jobs[:0] = jobs


class WorkerPool:
    """A fixed number of workers; one that dies is replaced.

    Args:
        ray: the module.
        start: starts an actor; returns it with a reference that resolves when it is ready.
        size: number of workers.
        title: description of a worker, for the log.
    """

    def __init__(
        self, ray: Any, start: Callable[[], tuple[Any, Any]], size: int, title: str
    ) -> None:
        self._ray = ray
        self._start = start
        self._title = title
        self._idle: list[_Worker] = []
        self._busy: dict[Any, tuple[_Worker, Job | None]] = {}
        self._deaths_in_a_row = 0
        self._size = size
        for number in range(1, size + 1):
            self._add(number)

    def map(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Any] | None]]:
        """Run the jobs, and yield each with its results as soon as it is finished.

        Yields:
            A job, possibly a part of a given one, and the results of its items, or None after
            `MAX_DEATHS` workers died during it.
        Raises:
            ExperimentError: workers keep dying.
            BHRoutingError: raised by a worker.
        """
        queue = JobQueue(jobs)
        while queue or any(job for _, job in self._busy.values()):
            self._hand_out(queue)
            ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=PATIENCE_SEC)
            if not ready and all(job is None for _, job in self._busy.values()):
                log.warning("still waiting for %s", self._title)
            for reference in ready:
                worker, job = self._busy.pop(reference)
                answer = self._fetch(reference, worker)
                if answer is not None:
                    self._idle.append(worker)
                    # Before the yield, so that the worker doesn't wait for the caller.
                    self._hand_out(queue)
                    if job is not None:
                        yield job, answer.results
                elif job is not None and job.deaths + 1 >= MAX_DEATHS:
                    yield job, None
                elif job is not None:
                    queue.put_back(job.retried())

    def close(self) -> None:
        """Stop all workers."""
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker.actor)
        self._idle, self._busy = [], {}

    def _add(self, number: int) -> None:
        actor, ready = self._start()
        self._busy[ready] = (_Worker(number, actor), None)

    def _hand_out(self, queue: JobQueue) -> None:
        while queue and self._idle:
            worker = self._idle.pop()
            job = queue.take(worker.group)
            worker.group = job.group
            method = getattr(worker.actor, job.method)
            self._busy[method.remote(list(job.items), *job.settings)] = (worker, job)

    def _fetch(self, reference: Any, worker: _Worker) -> Answer | None:
        """Return a worker's answer; if it died, start another one and return None."""
        exceptions = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            raise getattr(error, "cause", None) or error from error
        except (exceptions.RayActorError, exceptions.RaySystemError) as error:
            reason = str(error).strip().splitlines()[0]
            log.warning("worker %d died and is replaced: %s", worker.number, reason)
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= MAX_DEATHS * self._size:
                raise ExperimentError(
                    f"{self._deaths_in_a_row} workers died in a row, at most "
                    f"{MAX_DEATHS * self._size - 1} may (the last: {reason}); see Ray's logs, and "
                    "give workers more memory or take fewer with --workers"
                ) from error
            self._ray.kill(worker.actor)
            self._add(worker.number)
            return None
        self._deaths_in_a_row = 0
        for name, level, text in answer.log:
            logging.getLogger(name).log(level, "worker %d: %s", worker.number, text)
        return answer


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to a Ray cluster, or start Ray on this machine, and yield the module.

    An existing connection is used and left open.

    Raises:
        InputError: Ray isn't installed, or the cluster can't be reached.
    """
    earlier = signal.getsignal(signal.SIGTERM)
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise InputError(
            "--executor ray needs Ray, which isn't installed; run: pip install 'bh-routing[ray]', "
            "or leave --executor out"
        ) from None
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
