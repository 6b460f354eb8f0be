"""Threads: the number that is fastest for the model, unless the user set one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bh_routing.experiments import executors as threads_module
from bh_routing.experiments.executors import choose_threads, torch_threads
from bh_routing.experiments.run import run
from bh_routing.models import LoadedModel
from tests.experiments.conftest import MakeTinySpec


class Timed(nn.Module):
    """A model whose time depends on the number of threads as a test says."""

    def __init__(self, one_token: dict[int, float], batch: dict[int, float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.device = torch.device("cpu")
        self._seconds = {True: one_token, False: batch}

    def forward(self, input_ids: Tensor, **_: Any) -> None:
        time.sleep(self._seconds[input_ids.numel() == 1][torch.get_num_threads()])


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads_module, "TIMED_SEC", 0.05)
    with torch_threads(4):
        yield


@pytest.mark.usefixtures("four_threads")
def test_the_fastest_number_is_chosen_for_tokens_and_batches_apart() -> None:
    slower = {1: 0.01, 2: 0.06, 4: 0.12}
    faster = {1: 0.12, 2: 0.06, 4: 0.01}
    assert choose_threads(Timed(slower, faster)) == (1, 4)
    assert choose_threads(Timed({1: 0.12, 2: 0.01, 4: 0.06}, slower)) == (2, 1)
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_of_equally_fast_numbers_the_smallest_is_chosen() -> None:
    same = dict.fromkeys((1, 2, 4), 0.02)
    assert choose_threads(Timed(same, same)) == (1, 1)


@pytest.mark.usefixtures("four_threads")
def test_three_threads_are_tried_where_there_are_three() -> None:
    with torch_threads(3):
        faster = {1: 0.12, 2: 0.06, 3: 0.01}
        assert choose_threads(Timed(faster, faster)) == (3, 3)


@pytest.mark.usefixtures("four_threads")
def test_a_number_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    slower = {1: 0.01, 2: 0.06, 4: 0.12}
    assert choose_threads(Timed(slower, slower)) == (4, 4)


def test_choosing_leaves_the_demo_model_and_torch_as_they_were(
    demo: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    with torch_threads(2):
        chosen = choose_threads(demo.model)
        assert torch.get_num_threads() == 2
    assert chosen.decode in (1, 2) and chosen.batch in (1, 2)
    assert torch.get_num_threads() == before


def test_run_json_says_with_how_many_threads_and_how_they_wait(
    tiny_spec: MakeTinySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    spec = tiny_spec()
    before = torch.get_num_threads()
    with torch_threads(1):
        run(spec)
    assert torch.get_num_threads() == before
    provenance = json.loads((spec.output / "run.json").read_text())["provenance"]
    assert provenance["threads"] == provenance["batch_threads"] == 1
    assert provenance["omp_wait_policy"] == "passive"
