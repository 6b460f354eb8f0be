"""Ray's workers make a serial run's results, whatever dies meanwhile.

Slow: Ray alone takes seconds to start, and each worker loads the model.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bh_routing.experiments.configurations import make_rules
from bh_routing.experiments.executors import SerialExecutor, make_grid
from bh_routing.experiments.experiment import Experiment, Subject
from bh_routing.experiments.ray_executor import RayExecutor, RaySettings
from bh_routing.experiments.ray_pool import MAX_DEATHS, Job, WorkerPool, connected
from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.models import LoadedModel
from bh_routing.results.records import JOURNAL, QUALITY_JOURNAL, TIME_COLUMNS

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
# Ray's own; nothing of ours.
pytestmark += [pytest.mark.filterwarnings(f"ignore::{name}") for name in (
    "ResourceWarning", "FutureWarning", "DeprecationWarning",
    "pytest.PytestUnraisableExceptionWarning",
)]  # fmt: skip


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    pytest.importorskip("ray", reason="the extra `ray` isn't installed")
    with connected(None) as module:
        yield module


def start_small(ray: Any) -> tuple[Any, Any]:
    """Start a worker without a model, which dies of what it is told to die of."""

    class Small:
        def load(self) -> Any:
            return _answer([])

        def square(self, numbers: list[int]) -> Any:
            if 13 in numbers:
                os._exit(1)
            return _answer([number**2 for number in numbers])

    def _answer(results: list[int]) -> Any:
        from bh_routing.experiments.ray_pool import Answer

        return Answer(results, [("bh_routing", 30, f"did {len(results)}")])

    actor = ray.remote(Small).options(num_cpus=0).remote()
    return actor, actor.load.remote()


def test_what_kills_every_worker_is_given_up_alone(
    ray: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pool = WorkerPool(ray, lambda: start_small(ray), 2, "a small worker")
    jobs = [Job(method="square", items=items) for items in ((1, 2), (3, 13, 4), (5,))]
    found: dict[int, int | None] = {}
    for job, results in pool.map(jobs):
        found |= dict(zip(job.items, results or [None] * len(job.items), strict=True))
    pool.close()
    assert found == {1: 1, 2: 4, 3: 9, 4: 16, 5: 25, 13: None}
    assert caplog.text.count("died and is replaced") == MAX_DEATHS
    assert "worker 1: did" in caplog.text


def prepare(num_prompts: int = 6) -> list[Any]:
    configs = {
        "topk_8": {"method": "topk", "k": 8},
        "bh": {"method": "bh", "alpha": 0.2, "null": "gaussian"},
    }
    prompts = [{"text": f"On day {day} the ship"} for day in range(num_prompts)]
    spec = make_spec(RunSpec, model="demo", device="cpu", configs=configs, prompts=prompts)
    return make_grid(make_rules(spec.configs), spec.prompts)


def rows(done: list[tuple[Any, Experiment]]) -> dict[str, Any]:
    assert len({cell.key for cell, _ in done}) == len(done)
    return {cell.key: without_times(vars_of(each.record)) for cell, each in done}


def vars_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


def without_times(row: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in row.items() if name not in TIME_COLUMNS}


def test_killed_workers_lose_and_duplicate_nothing_ten_times_in_a_row(
    ray: Any, demo: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="bh_routing")
    cells, subject = prepare(num_prompts=24), Subject(*demo, None)
    serial = rows(list(SerialExecutor(subject).run(cells, 8)))
    with RayExecutor("demo", "auto", subject, RaySettings(num_workers=2)) as executor:
        for round_number in range(10):
            done, has_killed = [], False
            for pair in executor.run(cells, 8):
                done.append(pair)
                has_killed = has_killed or kill_a_busy_worker(executor, caplog.text)
            assert has_killed and rows(done) == serial, round_number
    assert caplog.text.count("died and is replaced") == 10


def kill_a_busy_worker(executor: RayExecutor, log: str) -> bool:
    pool = executor._pool
    assert pool is not None
    busy = [seat.number for seat, job in pool._busy.values() if job is not None]
    if busy:
        process = re.findall(rf"worker {busy[0]}: process (\d+)", log)[-1]
        os.kill(int(process), signal.SIGKILL)
    return bool(busy)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"It was day {i} at sea. " * 99 for i in range(20)))

    def build(output: Path, *options: str) -> list[str]:
        return [
            *(sys.executable, "-m", "bh_routing", "run", "--model", "demo", "--device", "cpu"),
            *("--configs", "topk_8,bh_moderate", "--prompts", "1-6", "--max-tokens", "12"),
            *("--text", str(text), "--tokens", "12000", "--token-traces", "0"),
            *("--timing-rounds", "0"),
            *("--output", str(output), *options),
        ]

    return build


@pytest.fixture(scope="module")
def serial(command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without workers."""
    folder = tmp_path_factory.mktemp("serial") / "results"
    run(command(folder))
    return folder


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def run(command: list[str]) -> None:
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def journal(path: Path) -> dict[str, Any]:
    """Read what a journal holds of each key, times apart; no key may be there twice."""
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    bodies = [line for line in lines if "key" in line]
    assert len({line["key"] for line in bodies}) == len(bodies)
    return {line["key"]: without_times(line["record"]) for line in bodies}


@pytest.mark.parametrize("round_number", range(10))
def test_a_run_on_workers_is_the_serial_one_and_survives_its_driver(
    round_number: int, command: Callable[..., list[str]], serial: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` isn't installed")
    folder = tmp_path / "results"
    on_ray = command(folder, "--executor", "ray", "--workers", "2")
    driver = subprocess.Popen(
        on_ray, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    records, deadline = folder / JOURNAL, time.monotonic() + 600
    while not (records.exists() and records.stat().st_size):
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.05 * round_number)  # at another place each time
    driver.kill()
    driver.communicate()
    before = journal(records)
    assert before
    run(on_ray)
    assert records.read_bytes().count(b'"key"') == 12
    for name in (JOURNAL, QUALITY_JOURNAL):
        assert journal(folder / name) == journal(serial / name)


@pytest.mark.parametrize(
    "options",
    [
        ("evaluate", "--configs", "topk_8,bh_moderate", "--tokens", "6000"),
        ("sweep", "--rule", "top_p", "--budget", "5", "--tokens", "6000"),
    ],
    ids=lambda options: str(options[0]),
)
def test_scores_from_workers_are_the_serial_ones(options: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` isn't installed")
    start = [sys.executable, "-m", "bh_routing", *options, "--model", "demo", "--device", "cpu"]
    run([*start, "--output", str(tmp_path / "serial")])
    run([*start, "--output", str(tmp_path / "ray"), "--executor", "ray", "--workers", "2"])
    serial = journal(tmp_path / "serial" / QUALITY_JOURNAL)
    assert serial
    assert journal(tmp_path / "ray" / QUALITY_JOURNAL) == serial
