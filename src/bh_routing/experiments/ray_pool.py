"""Workers of a Ray cluster that share a queue of jobs; a dead worker's job is done elsewhere.

Ray itself is imported on first use: whoever runs in one process needs none.
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
"""Workers that one job may take with it, and deaths in a row for each worker of the pool."""
PATIENCE_SEC: Final = 30.0
"""After this long without any worker, the log says what is waited for."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """A call of a worker's method: items first, then settings; it answers an item with a result."""

    method: str
    items: tuple[Any, ...]
    settings: tuple[Any, ...] = ()
    group: str = ""
    """A worker that has done a job of a group is given others of it: it has warmed up for it."""
    deaths: int = 0
    """Workers that died while they did it."""

    def retried(self) -> list[Job]:
        """What to do instead after a death: each item alone, so that a deadly one is found."""
        return [replace(self, items=(item,), deaths=self.deaths + 1) for item in self.items]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker's method returns."""

    results: list[Any]
    """One for each item."""
    log: list[tuple[str, int, str]]
    """Logger, level and text of what was logged meanwhile."""


@dataclass(eq=False, slots=True)
class _Seat:
    """One worker, and what it is good at."""

    number: int
    actor: Any
    group: str = ""


class JobQueue:
    """Jobs that wait, by group."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = list(jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def take(self, group: str) -> Job:
        """Take a job of this group; if there is none, the first of the group with most jobs."""
        waiting = Counter(job.group for job in self._jobs)
        wanted = group if group in waiting else max(waiting, key=waiting.__getitem__)
        place = next(i for i, job in enumerate(self._jobs) if job.group == wanted)
        return self._jobs.pop(place)

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Let jobs be taken next."""
        self._jobs[:0] = jobs


class WorkerPool:
    """A fixed number of workers; one that dies is replaced.

    Args:
        ray: the module.
        start: starts an actor and returns it with the reference that is there once it is ready.
        size: how many workers.
        title: what is waited for, for the log.
    """

    def __init__(
        self, ray: Any, start: Callable[[], tuple[Any, Any]], size: int, title: str
    ) -> None:
        self._ray = ray
        self._start = start
        self._title = title
        self._idle: list[_Seat] = []
        self._busy: dict[Any, tuple[_Seat, Job | None]] = {}
        self._deaths_in_a_row = 0
        self._size = size
        for number in range(1, size + 1):
            self._add(number)

    def map(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Any] | None]]:
        """Do the jobs, and yield each with its results as soon as they are there.

        Yields:
            A job, perhaps a part of one that was given, and the results of its items; None where
            `MAX_DEATHS` workers died of it.
        Raises:
            ExperimentError: workers keep dying.
            BHRoutingError: what a worker itself raised.
        """
        queue = JobQueue(jobs)
        while queue or any(job for _, job in self._busy.values()):
            self._hand_out(queue)
            ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=PATIENCE_SEC)
            if not ready and all(job is None for _, job in self._busy.values()):
                log.warning("still waiting for %s", self._title)
            for reference in ready:
                seat, job = self._busy.pop(reference)
                answer = self._fetch(reference, seat)
                if answer is not None:
                    self._idle.append(seat)
                    # First: the worker must not wait while the caller writes.
                    self._hand_out(queue)
                    if job is not None:
                        yield job, answer.results
                elif job is not None and job.deaths + 1 >= MAX_DEATHS:
                    yield job, None
                elif job is not None:
                    queue.put_back(job.retried())

    def close(self) -> None:
        """End all workers."""
        for seat in [*self._idle, *(seat for seat, _ in self._busy.values())]:
            self._ray.kill(seat.actor)
        self._idle, self._busy = [], {}

    def _add(self, number: int) -> None:
        actor, ready = self._start()
        self._busy[ready] = (_Seat(number, actor), None)

    def _hand_out(self, queue: JobQueue) -> None:
        while queue and self._idle:
            seat = self._idle.pop()
            job = queue.take(seat.group)
            seat.group = job.group
            method = getattr(seat.actor, job.method)
            self._busy[method.remote(list(job.items), *job.settings)] = (seat, job)

    def _fetch(self, reference: Any, seat: _Seat) -> Answer | None:
        """Return a worker's answer; None if it died, and then another one is started."""
        exceptions = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            raise getattr(error, "cause", None) or error from error
        except (exceptions.RayActorError, exceptions.RaySystemError) as error:
            reason = str(error).strip().splitlines()[0]
            log.warning("worker %d died and is replaced: %s", seat.number, reason)
            self._deaths_in_a_row += 1
            if self._deaths_in_a_row >= MAX_DEATHS * self._size:
                raise ExperimentError(
                    f"{self._deaths_in_a_row} workers died in a row, at most "
                    f"{MAX_DEATHS * self._size - 1} may (the last: {reason}); see Ray's logs, and "
                    "give workers more memory or take fewer with --workers"
                ) from error
            self._ray.kill(seat.actor)
            self._add(seat.number)
            return None
        self._deaths_in_a_row = 0
        for name, level, text in answer.log:
            logging.getLogger(name).log(level, "worker %d: %s", seat.number, text)
        return answer


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to a Ray cluster, or start Ray on this machine, and yield the module.

    A connection that is there already is used and left open.

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
        # On this machine nothing is reported to Ray's makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Otherwise Ray warns of its own future at every start.
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
    # Ray takes SIGTERM over, and would end the process without a word.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, earlier)
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()
