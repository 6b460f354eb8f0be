"""Measure the driver's overhead over a large grid of experiments that take no time.

    python -m benchmarks.large_grid [EXPERIMENTS] [FOLDER]

Every experiment is the same synthetic measurement of a model with 16 layers of 64 experts, so the
time is that of the store, the journal with its fsync, the derived files and the progress bar.
Prints JSON.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

from bh_routing.experiments.configurations import NamedRule
from bh_routing.experiments.executors import Cell, Executor, make_grid, run_grid
from bh_routing.experiments.experiment import Experiment
from bh_routing.experiments.identity import RunIdentity
from bh_routing.experiments.specs import Prompt
from bh_routing.experiments.store import ResultStore
from bh_routing.results.records import ExperimentDetail, ExperimentRecord
from bh_routing.rules.fixed import TopK

LAYERS, EXPERTS = 16, 64
NUM_PROMPTS: Final = 100
IDENTITY: Final = RunIdentity(
    model="none", model_fingerprint="0" * 64, dtype="float32", device_type="cpu", max_tokens=50
)


class NothingToDo:
    """An executor whose experiments finish immediately; it times the work between them."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def run(self, cells: Iterable[Cell], max_tokens: int) -> Iterator[tuple[Cell, Experiment]]:
        for cell in cells:
            experiment = make_experiment(cell)
            start = time.perf_counter()
            yield cell, experiment
            self.seconds.append(time.perf_counter() - start)


def make_experiment(cell: Cell) -> Experiment:
    """Return a measurement of realistic size; it shares no lists with others."""
    record = ExperimentRecord(
        config_name=cell.named_rule.name,
        prompt_text=cell.prompt.text,
        prompt_category=cell.prompt.category,
        prompt_description=cell.prompt.description,
        generated_text="and then the old man walked down to the river again " * 4,
        num_input_tokens=12,
        num_output_tokens=50,
        avg_experts_per_token=1 / 3,
    )
    detail = ExperimentDetail(
        output_token_ids=list(range(1000, 1050)),
        experts_by_layer=[layer / 7 for layer in range(LAYERS)],
        count_histogram=[[0] * 8 + [61] for _ in range(LAYERS)],
        expert_load=[[300 + layer for _ in range(EXPERTS)] for layer in range(LAYERS)],
    )
    return Experiment(record, detail)


def resident_mib() -> float:
    """Return the current memory of this process, or its peak if the system doesn't report it."""
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(folder: Path, num_experiments: int) -> dict[str, Any]:
    """Run the grid into an empty folder; times are means in milliseconds per experiment."""
    rules = [
        NamedRule(f"topk_{number}", "", TopK(k=1 + number % EXPERTS))
        for number in range(num_experiments // NUM_PROMPTS)
    ]
    prompts = [Prompt(text=f"It was day {number} at sea") for number in range(NUM_PROMPTS)]
    grid = make_grid(rules, prompts)
    executor = NothingToDo()
    fsync_sec, real_fsync = 0.0, os.fsync

    def timed_fsync(descriptor: int) -> None:
        nonlocal fsync_sec
        start = time.perf_counter()
        real_fsync(descriptor)
        fsync_sec += time.perf_counter() - start

    before = resident_mib()
    setattr(os, "fsync", timed_fsync)  # noqa: B010
    try:
        with ResultStore(folder, resume=True, checkpoint_interval=5) as store:
            store.begin(IDENTITY, {}, [cell.key for cell in grid])
            run_grid(cast(Executor, executor), grid, 50, store)
            growth = resident_mib() - before
    finally:
        setattr(os, "fsync", real_fsync)  # noqa: B010
    start = time.perf_counter()
    with ResultStore(folder, resume=True, checkpoint_interval=5) as store:
        store.begin(IDENTITY, {}, [cell.key for cell in grid])
        assert all(store.finished_record(cell.key) for cell in grid)
    tenth = len(grid) // 10
    times = [1000 * seconds for seconds in executor.seconds]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "experiments": len(grid),
        "first_tenth_ms": sum(times[:tenth]) / tenth,
        "last_tenth_ms": sum(times[-tenth:]) / tenth,
        "largest_ms": max(times),
        "fsync_ms": 1000 * fsync_sec / len(grid),
        "memory_growth_mib": growth,
        "reopen_sec": time.perf_counter() - start,
    }


def main() -> None:
    num_experiments = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        print(json.dumps(measure(Path(folder), num_experiments), indent=1))


if __name__ == "__main__":
    main()
