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

from bh_routing.errors import ExperimentError, InputError
from bh_routing.experiments import ray_executor
from bh_routing.experiments.configurations import make_rules
from bh_routing.experiments.executors import Cell, SerialExecutor, make_grid
from bh_routing.experiments.experiment import Experiment, Subject
from bh_routing.experiments.ray_executor import MAX_DEATHS, RayExecutor, connected
from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.models import LoadedModel, load_model
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


def fragile(deadly_call: str) -> type[ray_executor.Worker]:
    """Return a class of workers whose processes die of a call: of load, or run with one prompt."""

    # Here, because workers can't import this module.
    class Fragile(ray_executor.Worker):
        def load(self, *recipe: Any) -> Any:
            return os._exit(1) if deadly_call == "load" else super().load(*recipe)

        def run(self, cell: Cell, max_tokens: int) -> Any:
            return os._exit(1) if deadly_call in cell.prompt.text else super().run(cell, max_tokens)

    return Fragile


def ray_spec(num_workers: int) -> RunSpec:
    return make_spec(
        RunSpec, model="demo", device="cpu", dtype="float32", executor="ray", workers=num_workers
    )


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_kills_every_worker_is_given_up_alone(
    num_workers: int,
    ray: Any,
    demo: LoadedModel,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", logger="bh_routing")
    monkeypatch.setattr(ray_executor, "Worker", fragile("day 1"))
    cells = prepare(num_prompts=3)[:3]
    with RayExecutor(ray_spec(num_workers), Subject(*demo, None)) as executor:
        done = dict(executor.run(cells, 2))
    errors = [done[cell].record.error for cell in cells]
    assert errors[::2] == ["", ""] and f"{MAX_DEATHS} workers died of it" in errors[1]
    assert caplog.text.count("died and is replaced") == MAX_DEATHS
    assert "worker 1: process" in caplog.text


def test_workers_that_die_loading_the_model_end_the_run(
    ray: Any, demo: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "Worker", fragile("load"))
    with (
        RayExecutor(ray_spec(1), Subject(*demo, None)) as executor,
        pytest.raises(ExperimentError, match=r"workers died in a row.*more memory"),
    ):
        list(executor.run(prepare(num_prompts=1), 2))


def test_a_worker_whose_model_differs_ends_the_run_with_its_own_error(
    ray: Any,
) -> None:
    subject = Subject(*load_model("demo", device="cpu", dtype="bfloat16"), None)
    with (
        RayExecutor(ray_spec(1), subject) as executor,
        pytest.raises(InputError, match=r"can't be mixed with the driver's.*bfloat16"),
    ):
        list(executor.run(prepare(num_prompts=1), 2))


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
    killed: set[str] = set()
    with RayExecutor(ray_spec(2), subject) as executor:
        for round_number in range(10):
            done = []
            for pair in executor.run(cells, 8):
                done.append(pair)
                if len(killed) == round_number:  # workers are busy: most cells are left
                    processes = re.findall(r"process (\d+) on", caplog.text)
                    victim = next(each for each in reversed(processes) if each not in killed)
                    os.kill(int(victim), signal.SIGKILL)
                    killed.add(victim)
            assert len(killed) == round_number + 1
            assert rows(done) == serial, round_number
    assert caplog.text.count("died and is replaced") == 10


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


PATHS = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}


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
