"""Real servers, started by `bh-routing serve` on the demo model, and asked over HTTP."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from bh_routing.models.load import LoadedModel
from bh_routing.models.routing import route
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.catalog import make_rule
from bh_routing.serving.config import VARIABLE
from tests.serving.checkpoints import SENTENCES, Change, changed_checkpoint, damage, turn
from tests.serving.conftest import (
    OPTIONS,
    Serve,
    Server,
    continue_alone,
    environment,
    free_port,
    write_yaml,
)
from tests.serving.steps import Call, check_calls

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(1800)]

STEP_RULE = {"method": "bh_drop", "alpha": 0.3, "scope": "step_population"}
RECORDER = """
import os
from itertools import count

import torch
from safetensors.torch import save_file


def register():
    from bh_routing.serving.layer import ServedLayer

    if ServedLayer.decide.__name__ == "record":
        return
    decide, numbers, calls = ServedLayer.decide, {}, count()

    def record(layer, logits, weights, index):
        decided = decide(layer, logits, weights, index)
        number = torch.tensor(numbers.setdefault(id(layer), len(numbers)))
        step = layer._rows.of(len(index)).step_T
        parts = [number, logits, weights, index, *decided, step]
        content = {str(place): part.clone().contiguous() for place, part in enumerate(parts)}
        save_file(content, f"{os.environ['RECORDER_FOLDER']}/{next(calls):06}.safetensors")
        return decided

    ServedLayer.decide = record
"""


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a vLLM plugin of its own, which records every decision of our plugin."""
    folder = tmp_path_factory.mktemp("recorder")
    (folder / "calls_recorder.py").write_text(RECORDER)
    facts = folder / "calls_recorder-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: calls_recorder\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(
        "[vllm.general_plugins]\ncalls_recorder = calls_recorder:register\n"
    )
    return folder


def read_calls(folder: Path) -> list[Call]:
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return [
        Call(int(part["0"]), *(part[str(place)] for place in range(1, len(Call._fields))))
        for part in parts
    ]


@pytest.fixture(scope="module")
def bh_server(serve: Serve, calibration_file: Path) -> Server:
    return serve("demo", "--rule", "bh:alpha=0.05", "--calibration", str(calibration_file))


@pytest.fixture(scope="module")
def step_server(serve: Serve, calibration_file: Path, recorder: Path) -> Server:
    rule = "bh_drop:alpha=0.3,scope=step_population"
    return serve(
        "demo", "--rule", rule, "--calibration", str(calibration_file),
        options=(*OPTIONS, "--no-enable-prefix-caching"),
        PYTHONPATH=str(recorder), RECORDER_FOLDER=str(recorder),
    )  # fmt: skip


def test_a_server_under_bh_answers_with_the_tokens_of_route(
    bh_server: Server, demo: LoadedModel, prompts: list[list[int]], served_calibration: Calibration
) -> None:
    served = bh_server.complete_all(prompts)
    with route(demo.model, make_rule({"method": "bh", "alpha": 0.05}), served_calibration):
        assert served == [continue_alone(demo.model, ids) for ids in prompts]


@pytest.mark.full
def test_two_tensor_parallel_ranks_answer_with_the_tokens_of_route(
    serve: Serve,
    demo: LoadedModel,
    prompts: list[list[int]],
    served_calibration: Calibration,
    calibration_file: Path,
) -> None:
    own = ("--rule", "bh_drop:alpha=0.3", "--calibration", str(calibration_file))
    server = serve("demo", *own, options=(*OPTIONS, "--tensor-parallel-size", "2"))
    served = server.complete_all(prompts)
    with route(demo.model, make_rule({"method": "bh_drop", "alpha": 0.3}), served_calibration):
        assert served == [continue_alone(demo.model, ids) for ids in prompts]
    assert server.log.read_text().count("is bound to 6 layers") == 2
    assert server.metrics()["bh_routing_sampled_tokens_total"] > 0


def test_the_steps_of_eight_concurrent_requests_are_decided_as_by_the_reference(
    step_server: Server, prompts: list[list[int]], served_calibration: Calibration, recorder: Path
) -> None:
    for path in recorder.glob("*.safetensors"):
        path.unlink()
    # Long enough that all eight overlap, however slowly they arrive.
    answers = step_server.complete_all(prompts, max_tokens=80)
    assert [len(answer) for answer in answers] == [80] * 8
    calls = read_calls(recorder)
    prefill, decode = check_calls(calls, make_rule(STEP_RULE), served_calibration)
    assert decode == 6 * 8 * 79
    assert prefill == 6 * sum(map(len, prompts))
    assert max(int((call.step_T >= 0).sum()) for call in calls) == 8
    dropped = sum(int((call.weights_TK == 0).sum()) for call in calls)
    assert dropped > 0.1 * 8 * decode


def test_cancelled_requests_leave_the_decisions_of_a_step_right(
    step_server: Server, prompts: list[list[int]], served_calibration: Calibration, recorder: Path
) -> None:
    for path in recorder.glob("*.safetensors"):
        path.unlink()
    with ThreadPoolExecutor(12) as threads:
        asked = [threads.submit(step_server.complete, ids, 60) for ids in prompts[:4]]
        gone = [threads.submit(cancel, step_server, ids) for ids in prompts]
        answers = [future.result() for future in asked]
        for future in gone:
            future.result()
    assert [len(answer) for answer in answers] == [60] * 4
    calls = read_calls(recorder)
    _, decode = check_calls(calls, make_rule(STEP_RULE), served_calibration)
    assert 6 * 4 * 59 < decode < 6 * (4 * 59 + 8 * 199)
    assert max(int((call.step_T >= 0).sum()) for call in calls) > 4


def test_two_hundred_requests_with_cancelled_ones_leave_the_server_whole(
    bh_server: Server, demo: LoadedModel, prompts: list[list[int]], served_calibration: Calibration
) -> None:
    before, memory = bh_server.metrics(), resident_bytes(bh_server)
    draw = random.Random(0)
    jobs = [(draw.choice(prompts), draw.randint(4, 24), draw.random() < 0.2) for _ in range(200)]

    def ask(job: tuple[list[int], int, bool]) -> list[int] | None:
        ids, length, is_cancelled = job
        if not is_cancelled:
            return bh_server.complete(ids, length)
        cancel(bh_server, ids)
        return None

    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(ask, jobs))
    with route(demo.model, make_rule({"method": "bh", "alpha": 0.05}), served_calibration):
        wanted = {tuple(ids): continue_alone(demo.model, ids) for ids in prompts}
    for (ids, length, is_cancelled), answer in zip(jobs, answers, strict=True):
        assert is_cancelled or answer == wanted[tuple(ids)][:length]
    after = bh_server.metrics()
    tokens, experts = (
        after[f"bh_routing_sampled_{name}_total"] - before[f"bh_routing_sampled_{name}_total"]
        for name in ("tokens", "experts")
    )
    assert 1 <= experts / tokens < 8
    assert resident_bytes(bh_server) < memory + 200e6


def cancel(server: Server, ids: list[int]) -> None:
    """Start a streamed completion, and close the connection after its first line."""
    body = {"model": "demo", "prompt": ids, "max_tokens": 200, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        answer.readline()


def resident_bytes(server: Server) -> int:
    """Resident memory of the server's processes, which share its process group."""
    group, total = server.process.pid, 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            total += 4096 * int(fields[21])
    return total


def test_the_metrics_name_the_rule(bh_server: Server) -> None:
    assert "bh_routing_info{" in (text := bh_server.get("/metrics"))
    assert 'rule="bh"' in text or 'rule="bh:alpha=0.05"' in text


def failing_start(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Start something that must end by itself."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )


VLLM = "vllm.entrypoints.openai.api_server"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"rule": {"method": "bh"}}, "rule 'bh' needs a calibration with background"),
        pytest.param(
            {"rule": {"method": "bh", "alhpa": 0.1}},
            "did you mean 'alpha'?",
            marks=pytest.mark.full,
        ),
        pytest.param(
            {"rule": {"method": "bh"}, "calibration": "nowhere.safetensors"},
            "does not exist or is no file",
            marks=pytest.mark.full,
        ),
    ],
    ids=["no calibration", "unknown key", "missing calibration"],
)
def test_a_wrong_configuration_ends_vllm_with_one_sentence(
    content: dict[str, Any], sentence: str, checkpoint: str, tmp_path: Path
) -> None:
    config = write_yaml(tmp_path / "config.yaml", content)
    done = failing_start(VLLM, "--model", checkpoint, *OPTIONS, **{VARIABLE: str(config)})
    assert done.returncode != 0
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("bh-routing: ")]
    assert sentence in line
    assert "Traceback" not in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("change", [turn, damage])
def test_another_models_calibration_and_nan_end_vllm_before_it_serves(
    change: Change, checkpoint: str, calibration_file: Path, tmp_path: Path
) -> None:
    content = {"rule": {"method": "bh", "alpha": 0.05}, "calibration": str(calibration_file)}
    config = write_yaml(tmp_path / "config.yaml", content)
    model = changed_checkpoint(tmp_path / "model", checkpoint, change)
    port = ("--port", str(free_port()))
    done = failing_start(VLLM, "--model", model, *port, *OPTIONS, **{VARIABLE: str(config)})
    assert done.returncode != 0
    (line,) = [line for line in done.stdout.splitlines() if "bh-routing: " in line]
    assert SENTENCES[change.__name__] in line
    assert "Application startup complete" not in done.stdout
