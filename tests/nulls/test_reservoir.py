"""A uniform sample in fixed memory, the same for the same stream and seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from bh_routing.errors import CalibrationError, InputError
from bh_routing.nulls import Reservoir, reservoir_capacity
from bh_routing.nulls.cut_offs import DRAWS_ON_FIRST_LINE

STREAM = torch.arange(10_000, dtype=torch.float32)


def sample(chunk: int, seed: int = 0, capacity: int = 300) -> torch.Tensor:
    reservoir = Reservoir(capacity, seed)
    for scores in STREAM.split(chunk):
        reservoir.add(scores)
    return reservoir.table().sorted_scores_N


def test_a_stream_shorter_than_the_capacity_is_kept_whole() -> None:
    assert torch.equal(sample(700, capacity=20_000), STREAM)


def test_the_same_seed_and_stream_give_the_same_sample_in_any_chunks() -> None:
    assert torch.equal(sample(10_000), sample(7))


def test_another_seed_gives_another_sample() -> None:
    assert not torch.equal(sample(100, seed=0), sample(100, seed=1))


def test_a_sample_holds_distinct_members_of_the_stream_up_to_the_capacity() -> None:
    scores = sample(64)
    assert scores.numel() == 300
    assert scores.unique().numel() == 300


def test_every_part_of_the_stream_is_equally_likely() -> None:
    # 400 seeds, 10 tenths of the stream; a true claim fails with probability 0.001.
    tenths = torch.cat([sample(1_000, seed=seed, capacity=100) for seed in range(400)]) // 1_000
    assert chisquare(np.bincount(tenths.int().numpy(), minlength=10)).pvalue > 0.001


def test_memory_stays_below_twice_the_capacity() -> None:
    reservoir = Reservoir(100, seed=0)
    for scores in STREAM.split(50):
        reservoir.add(scores)
        assert reservoir._scores.size <= 200
    assert len(reservoir) == 100
    assert reservoir.num_seen == 10_000


def test_a_table_made_early_does_not_disturb_the_stream() -> None:
    reservoir = Reservoir(300, seed=0)
    for scores in STREAM.split(1_000):
        reservoir.add(scores)
        reservoir.table()
    assert torch.equal(reservoir.table().sorted_scores_N, sample(1_000))


def test_bf16_scores_of_any_shape_are_taken() -> None:
    reservoir = Reservoir(10, seed=(0, 1))
    reservoir.add(torch.ones(2, 3, dtype=torch.bfloat16))
    assert reservoir.table().sorted_scores_N.tolist() == [1.0] * 6


def test_an_empty_reservoir_makes_no_table() -> None:
    with pytest.raises(CalibrationError, match="at least one score"):
        Reservoir(10, seed=0).table()


def test_a_capacity_below_1_is_refused() -> None:
    with pytest.raises(InputError, match="capacity must be at least 1, got 0"):
        Reservoir(0, seed=0)


def test_the_capacity_is_what_the_smallest_alpha_needs() -> None:
    assert reservoir_capacity(64, 0.005) == DRAWS_ON_FIRST_LINE * 64 / 0.005
