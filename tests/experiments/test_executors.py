"""Work is cut, handed out and taken back as promised, and wrong options are one sentence.

Nothing here needs Ray; `test_executors_ray.py` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.cli import main
from bh_routing.errors import InputError
from bh_routing.experiments.configurations import make_rules
from bh_routing.experiments.executors import SerialExecutor, make_grid
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.ray_executor import (
    MOST_PROMPTS,
    RayExecutor,
    RaySettings,
    cut_blocks,
    gpu_fraction,
)
from bh_routing.experiments.ray_pool import Job, JobQueue
from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.models import LoadedModel, load_model, route
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg

CONFIGS = {name: {"method": "topk", "k": k} for name, k in (("a", 8), ("b", 4), ("c", 2))}


def make_cells(num_prompts: int) -> list[Any]:
    prompts = [{"text": f"Prompt {number}"} for number in range(num_prompts)]
    spec = make_spec(RunSpec, configs=CONFIGS, prompts=prompts)
    return make_grid(make_rules(spec.configs), spec.prompts)


@pytest.mark.parametrize(("num_prompts", "num_workers"), [(1, 1), (12, 2), (100, 2), (100, 64)])
def test_blocks_hold_each_cell_once_and_one_configuration_each(
    num_prompts: int, num_workers: int
) -> None:
    cells = make_cells(num_prompts)
    blocks = cut_blocks(cells, max_tokens=5, num_workers=num_workers)
    assert [cell.key for block in blocks for cell in block.items] == [cell.key for cell in cells]
    for block in blocks:
        assert {cell.named_rule.name for cell in block.items} == {block.group}
        assert len(block.items) <= MOST_PROMPTS
    assert len(blocks) >= min(len(cells), 4 * num_workers)


def test_a_worker_stays_with_a_configuration_and_then_helps_where_most_is_left() -> None:
    jobs = [Job(method="run", items=(name,), group=name) for name in "aabbbc"]
    queue = JobQueue(jobs)
    assert [queue.take(group).group for group in ("a", "a", "a", "b", "c", "c")] == list("aabbcb")
    assert not queue


def test_after_a_death_each_item_is_tried_alone_and_next() -> None:
    queue = JobQueue([Job(method="run", items=("z",), group="z")])
    queue.put_back(Job(method="run", items=(1, 2), group="a").retried())
    taken = [queue.take("a"), queue.take("a")]
    assert [(job.items, job.deaths) for job in taken] == [((1,), 1), ((2,), 1)]


def test_a_worker_asks_for_the_share_of_a_gpu_that_its_model_fills() -> None:
    gib = 2**30
    assert gpu_fraction(14 * gib, 80 * gib) == 1 / 4
    assert gpu_fraction(60 * gib, 80 * gib) == gpu_fraction(200 * gib, 80 * gib) == 1
    assert gpu_fraction(gib // 50, 80 * gib) == 1 / MOST_PROMPTS


def test_workers_find_the_model_from_any_working_directory(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "model"):
        (tmp_path / name).mkdir()  # a results folder may be called as the packaged model is

    def source(name: str) -> str:
        settings = RaySettings()
        return RayExecutor(name, "auto", Subject(*demo, None), settings)._recipe.model

    assert source("demo") == "demo"
    assert source("model") == str(tmp_path / "model")
    assert source("owner/name") == "owner/name"


def test_the_serial_executor_does_each_cell_in_order(demo: LoadedModel) -> None:
    cells = make_cells(2)
    with SerialExecutor(Subject(*demo, None)) as executor:
        done = list(executor.run(cells, max_tokens=2))
    assert [cell for cell, _ in done] == cells
    assert [e.record.avg_experts_per_token for _, e in done] == [8, 8, 4, 4, 2, 2]


def test_without_ray_the_executor_is_refused_and_nothing_is_written(
    tiny_spec: Callable[..., RunSpec],
    loaded_demo: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["run", "--model", "demo", "--device", "cpu", "--output", str(tmp_path / "results")]
    assert main([*command, "--executor", "ray", "--no-eval", "--configs", "topk_8"]) == 2
    assert "--executor ray needs Ray" in (message := capsys.readouterr().err)
    assert "bh-routing[ray]" in message
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
