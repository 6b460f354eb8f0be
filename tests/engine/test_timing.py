"""Timing side by side, and what a step costs."""

from __future__ import annotations

from functools import partial

import torch

from bh_routing.engine.decode import engine_of
from bh_routing.engine.timing import time_interleaved
from bh_routing.experiments.pass_cost import prefill_cost, step_cost
from bh_routing.models import LoadedModel


def test_every_round_runs_all_in_an_order_of_its_own_and_the_first_does_not_count() -> None:
    order: list[str] = []

    def run(name: str, seconds: float) -> float:
        order.append(name)
        return 100.0 if len(order) <= 3 else seconds

    runs = {name: partial(run, name, sec) for name, sec in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    timings = time_interleaved(runs, rounds=6)
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 7
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1
    assert timings["b"] == (2.0, 2.0, 2.0, 6)


def test_a_step_reads_each_expert_once_and_multiplies_every_kept_one(demo: LoadedModel) -> None:
    decoder = engine_of(demo.model).decoder
    # Two steps, six layers, two texts, three slots; texts share expert 5, and keep 2 and 1.
    kept = torch.tensor([[5, 7, -1], [5, -1, -1]], dtype=torch.int16).expand(2, 6, 2, 3)
    cost = step_cost(decoder, kept, context=10)
    assert cost.mean_experts == 1.5
    assert cost.distinct_experts == 2.0
    dense = 6 * (4 * 128 * 128 + 64 * 128) + 8192 * 128
    expert = 3 * 128 * 64
    cache = 2 * 10 * 2 * 128 * 6
    assert cost.bytes == 4 * (dense + 6 * 2 * expert + cache)
    assert cost.flops_per_token == 2 * (dense + 6 * 1.5 * expert) + 4 * 10 * 128 * 6


def test_a_prefill_reads_each_expert_once_and_multiplies_every_kept_one(demo: LoadedModel) -> None:
    decoder = engine_of(demo.model).decoder
    # Two tokens, six layers, three slots; the tokens share expert 5, and keep 2 and 1.
    kept = torch.tensor([[5, 7, -1], [5, -1, -1]], dtype=torch.int16)[:, None].expand(2, 6, 3)
    cost = prefill_cost(decoder, kept)
    assert (cost.mean_experts, cost.distinct_experts) == (1.5, 2.0)
    layers, head = 6 * (4 * 128 * 128 + 64 * 128), 8192 * 128
    expert = 3 * 128 * 64
    assert cost.bytes == 4 * (layers + head + 6 * 2 * expert + 2 * 2 * 128 * 6)
    attention = 4 * 1 * 128 * 6
    assert cost.flops_per_token == 2 * (layers + head / 2 + 6 * 1.5 * expert) + attention
