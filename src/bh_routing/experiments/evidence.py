"""Run the protocol of docs/evidence.md on a model, each part in a process of its own.

A part that fails doesn't stop the others. What a part does is in evidence_parts.py; nothing here
imports torch.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, field_validator

from bh_routing.errors import BHRoutingError, InputError, ResultsError, unknown_name
from bh_routing.experiments.folder import only_writer
from bh_routing.experiments.specs import NO_OPTION, Count, ModelSpec, Names
from bh_routing.results.files import find_json_object, render_json, write_atomically
from bh_routing.results.records import (
    CALIBRATION_PART,
    ESTIMATE_JSON,
    ESTIMATE_PART,
    EVIDENCE_PARTS,
    OUTCOME_JSON,
    PROTOCOL_JSON,
    PRUNING_PART,
)

_OF_RESULTS: Final = ("model", "dtype", "seed", "tokens", "calibration_tokens")
"""Settings on which results depend; the others may differ when a folder is resumed."""

log = logging.getLogger(__name__)


class EvidenceSpec(ModelSpec):
    """Settings of `evidence`."""

    model: Annotated[str, Field(min_length=1), NO_OPTION]
    """`demo`, a folder with a checkpoint, or a Hugging Face id."""
    output: Path
    """Folder of EVIDENCE.md, with a folder for each part; the same command resumes."""
    parts: Names = Field(default_factory=lambda: list(EVIDENCE_PARTS))
    """Parts of the protocol to run, separated by commas."""
    tokens: Count | None = None
    """Most tokens of the packaged evaluation text to score, spread over its documents. Default:
    all."""
    calibration_tokens: Annotated[int, Field(ge=6_000)] = 49_152
    """Tokens of the packaged calibration text; the null distribution per_expert takes about
    30,000 for alpha 0.05 with 64 experts."""
    jobs: Count = 1
    """Parts at a time, each in a process with its own copy of the model: a small model leaves a
    GPU idle."""
    estimate: bool = False
    """Only load the model and estimate time and memory."""

    @field_validator("parts")
    @classmethod
    def _known_parts(cls, value: list[str]) -> list[str]:
        for part in value:
            if part not in EVIDENCE_PARTS:
                raise ValueError(str(unknown_name("part", part, EVIDENCE_PARTS)))
        if not value:
            raise ValueError(f"no part is left to run; name one of {', '.join(EVIDENCE_PARTS)}")
        return list(dict.fromkeys(value))


RunPart = Callable[[EvidenceSpec, str], None]
"""Carries out one part, in a new process; a function of a module, so that it can be imported."""


def evidence(
    spec: EvidenceSpec, run_part: RunPart, conclude: Callable[[Path], object]
) -> dict[str, Any]:
    """Run the parts of the protocol that a folder lacks; parts that failed are tried again.

    Args:
        spec: the model, the folder and the parts.
        run_part: carries out one part.
        conclude: called with the folder after each part.
    Returns:
        The estimate, and the outcome of each part: its seconds, and the reason if it failed.
    Raises:
        InputError: the model can't be loaded or routed.
        ResultsError: the folder holds evidence of something else, or can't be written.
    """
    with only_writer(spec.output):
        _claim(spec)
        parts = [CALIBRATION_PART, *spec.parts]
        waiting = [part for part in parts if not _is_done(spec.output, part)]
        if waiting:
            for _ in _run([ESTIMATE_PART], spec, run_part):
                pass
            reason = read_outcome(spec.output, ESTIMATE_PART).get("reason")
            if reason is not None:
                raise InputError(reason)
            log.info(describe_estimate(_estimate(spec.output), waiting, spec.jobs))
        if not spec.estimate:
            for part in _run(waiting, spec, run_part):
                _log_outcome(part, read_outcome(spec.output, part))
                conclude(spec.output)
            conclude(spec.output)
        outcomes = {part: read_outcome(spec.output, part) for part in parts}
        return {"estimate": _estimate(spec.output), "parts": outcomes}


def describe_estimate(estimate: dict[str, Any], parts: Iterable[str], jobs: int) -> str:
    """Describe time and memory of parts in one sentence.

    Example:
        >>> estimate = {"seconds": {"calibration": 60, "nulls": 300}, "memory_bytes": 2**31}
        >>> describe_estimate(estimate, ["calibration", "nulls"], jobs=2)
        'about 6 minutes (calibration 1, nulls 5) in 2 processes at a time, each with 2.0 GiB'
    """
    seconds = {part: float(estimate["seconds"][part]) for part in parts}
    first = seconds.get(CALIBRATION_PART, 0.0)
    rest = [value for part, value in seconds.items() if part != CALIBRATION_PART]
    total = first + max(max(rest, default=0.0), sum(rest) / jobs)
    shown = ", ".join(f"{part} {value / 60:.2g}" for part, value in seconds.items())
    processes = "one process" if jobs == 1 else f"{jobs} processes"
    return (
        f"about {total / 60:.2g} minutes ({shown}) in {processes} at a time, each with "
        f"{estimate['memory_bytes'] / 2**30:.1f} GiB"
    )


def read_outcome(folder: Path, part: str) -> dict[str, Any]:
    """Return the outcome of a part: `reason` of its failure or None, `seconds`, `finished_at`."""
    return find_json_object(folder / part / OUTCOME_JSON) or {}


def _is_done(folder: Path, part: str) -> bool:
    outcome = read_outcome(folder, part)
    return bool(outcome) and outcome.get("reason") is None


def _estimate(folder: Path) -> dict[str, Any]:
    return find_json_object(folder / ESTIMATE_PART / ESTIMATE_JSON) or {}


def _claim(spec: EvidenceSpec) -> None:
    """Write the protocol's settings, or check that the folder's are the same."""
    own = spec.model_dump(mode="json", include=set(_OF_RESULTS))
    path = spec.output / PROTOCOL_JSON
    stored = find_json_object(path)
    if stored is None:
        write_atomically(path, render_json(own))
        return
    differences = [
        f"{name}: {stored.get(name)} there, {own[name]} now"
        for name in _OF_RESULTS
        if stored.get(name) != own[name]
    ]
    if differences:
        raise ResultsError(
            f"{spec.output} holds evidence of something else ({'; '.join(differences)}); choose "
            "another --output"
        )


def _log_outcome(part: str, outcome: dict[str, Any]) -> None:
    if outcome.get("reason") is None:
        log.info("%s finished after %.0f s", part, outcome.get("seconds", 0.0))
    else:
        log.warning("%s failed: %s", part, outcome["reason"])


def _run(parts: Iterable[str], spec: EvidenceSpec, run_part: RunPart) -> Iterator[str]:
    """Run parts in processes, and yield each when it has ended; pruning needs no calibration."""
    waiting, running = list(parts), dict[str, BaseProcess]()
    try:
        while waiting or running:
            open_parts = [*waiting, *running]
            for part in [*waiting]:
                is_ready = part == PRUNING_PART or CALIBRATION_PART not in open_parts
                if (is_ready or part == CALIBRATION_PART) and len(running) < spec.jobs:
                    waiting.remove(part)
                    running[part] = _start(part, spec, run_part)
            wait([process.sentinel for process in running.values()])
            for part in [part for part in running if running[part].exitcode is not None]:
                if code := running.pop(part).exitcode:
                    reason = f"its process was ended by {_name(-code)}; is there enough memory?"
                    _write_outcome(spec.output / part, 0.0, reason)
                yield part
                failure = read_outcome(spec.output, part).get("reason")
                if part != CALIBRATION_PART or failure is None:
                    continue
                for other in [other for other in waiting if other != PRUNING_PART]:
                    waiting.remove(other)
                    _write_outcome(spec.output / other, 0.0, f"the calibration failed: {failure}")
                    yield other
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _name(number: int) -> str:
    return signal.Signals(number).name if number > 0 else f"exit code {-number}"


def _start(part: str, spec: EvidenceSpec, run_part: RunPart) -> BaseProcess:
    folder = spec.output / part
    folder.mkdir(exist_ok=True)
    (folder / OUTCOME_JSON).unlink(missing_ok=True)
    log.info("%s begins; its log is %s", part, folder / "log.txt")
    process = multiprocessing.get_context("spawn").Process(
        target=_work, args=(run_part, spec, part), daemon=True
    )
    process.start()
    return process


def _work(run_part: RunPart, spec: EvidenceSpec, part: str) -> None:
    """Carry out a part in this new process, and write its outcome."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    if spec.jobs > 1:  # read when torch loads
        cores = (os.cpu_count() or 1) // spec.jobs
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    folder = spec.output / part
    with (folder / "log.txt").open("a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    start, reason = time.perf_counter(), None
    try:
        run_part(spec, part)
    except BHRoutingError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001  # the other parts go on
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    _write_outcome(folder, time.perf_counter() - start, reason)


def _follow_parent() -> None:
    """End this process when the one that started it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_outcome(folder: Path, seconds: float, reason: str | None) -> None:
    folder.mkdir(exist_ok=True)
    outcome = {
        "reason": reason,
        "seconds": round(seconds, 1),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_atomically(folder / OUTCOME_JSON, render_json(outcome))
