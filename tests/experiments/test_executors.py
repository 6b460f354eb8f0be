"""Executors take the workers and the model that were asked for; wrong options are one sentence.

Nothing here needs Ray; `test_executors_ray.py` does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.cli import main
from bh_routing.errors import InputError
from bh_routing.experiments.configurations import make_rules
from bh_routing.experiments.executors import SerialExecutor, make_grid
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.ray_executor import MOST_PER_GPU, RayExecutor, count_room, gpu_fraction
from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.models import LoadedModel, load_model, route
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg

CONFIGS = {name: {"method": "topk", "k": k} for name, k in (("a", 8), ("b", 4), ("c", 2))}


def make_cells(num_prompts: int) -> list[Any]:
    prompts = [{"text": f"Prompt {number}"} for number in range(num_prompts)]
    spec = make_spec(RunSpec, configs=CONFIGS, prompts=prompts)
    return make_grid(make_rules(spec.configs), spec.prompts)


def test_a_worker_asks_for_the_share_of_a_gpu_that_its_model_fills() -> None:
    gib = 2**30
    assert gpu_fraction(14 * gib, 80 * gib) == 1 / 4
    assert gpu_fraction(60 * gib, 80 * gib) == gpu_fraction(200 * gib, 80 * gib) == 1
    assert gpu_fraction(gib // 50, 80 * gib) == 1 / MOST_PER_GPU


@pytest.mark.parametrize(
    ("needs", "room"),
    [({"num_cpus": 2}, 3), ({"num_cpus": 1, "num_gpus": 1 / 3}, 6), ({"num_gpus": 1}, 2)],
)
def test_as_many_workers_fit_as_the_scarcest_resource_allows(
    needs: dict[str, float], room: int
) -> None:
    resources = {"CPU": 7.0, "GPU": 2.0, "memory": 1e9}
    assert count_room(needs, resources, wanted=room) == room
    with pytest.raises(InputError, match=f"{room + 1} workers were asked for.*room for {room};"):
        count_room(needs, resources, wanted=room + 1)


def test_workers_find_the_model_from_any_working_directory(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "model"):
        (tmp_path / name).mkdir()  # a results folder may be called as the packaged model is

    def source(name: str) -> str:
        spec = make_spec(RunSpec, model=name)
        return str(RayExecutor(spec, Subject(*demo, None))._recipe[0].model)

    assert source("demo") == "demo"
    assert source("model") == str(tmp_path / "model")
    assert source("owner/name") == "owner/name"


def test_the_serial_executor_does_each_cell_in_order(demo: LoadedModel) -> None:
    cells = make_cells(2)
    with SerialExecutor(Subject(*demo, None)) as executor:
        done = list(executor.run(cells, max_tokens=2))
    assert [cell for cell, _ in done] == cells
    assert [e.record.avg_experts_per_token for _, e in done] == [8, 8, 4, 4, 2, 2]


@pytest.mark.parametrize("command", ["run", "evaluate", "sweep"])
def test_without_ray_the_executor_is_refused_before_the_model_is_sought(
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    output = ["--output", str(tmp_path / "results")]
    assert main([command, "--model", "./nowhere", "--executor", "ray", *output]) == 2
    message = capsys.readouterr().err
    assert "--executor ray needs Ray" in message and "bh-routing[ray]" in message
    assert "use --executor local" in message
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workers": 2}, 'executor="ray"'),
        ({"ray_address": "auto"}, 'executor="ray"'),
        ({"executor": "ray", "workers": 0}, "workers"),
        ({"executor": "dask"}, "local.*ray"),
        ({"executor": "ray", "device_map": "auto"}, "exclude each other"),
        ({"device_map": "balanced"}, "device_map"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        make_spec(RunSpec, **options)
    assert "\n" not in str(caught.value)


def test_a_device_map_and_the_cpu_exclude_each_other() -> None:
    with pytest.raises(InputError, match="spreads a model over GPUs"):
        load_model("demo", device="cpu", device_map="auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the map is of GPUs")
def test_without_gpus_a_device_map_changes_nothing(
    demo: LoadedModel, demo_inputs: dict[str, Any]
) -> None:
    assert_routes_alike(load_model("demo", device_map="auto").model, demo.model, demo_inputs)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_several_gpus_route_as_on_one(demo_inputs: dict[str, Any]) -> None:
    spread = load_model("demo", dtype="float32", device_map="auto").model
    assert len({parameter.device for parameter in spread.parameters()}) > 1
    inputs = {name: tensor.cuda() for name, tensor in demo_inputs.items()}
    assert_routes_alike(spread, load_model("demo", dtype="float32").model, inputs)


def assert_routes_alike(first: Any, second: Any, inputs: dict[str, Any]) -> None:
    logits, rule = [], BenjaminiHochberg(alpha=0.05, null="gaussian")
    for model in (first, second):
        with torch.inference_mode(), route(model, rule) as trace:
            logits.append(model(**inputs).logits)
        logits.append(trace.expert_counts)
    torch.testing.assert_close(logits[0], logits[2])
    torch.testing.assert_close(logits[1], logits[3])
