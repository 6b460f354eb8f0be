from __future__ import annotations

import numpy as np
import pytest

from bh_routing.stats.load_balance import load_columns, measures_of, uniform_cv


def test_the_noise_value_is_what_a_uniform_router_shows_on_average() -> None:
    # 400 runs of 50 tokens, seed 0; the standard error of the mean square is below 1 %.
    generator = np.random.default_rng(0)
    counts_T = generator.integers(1, 9, size=50)
    squares = []
    for _ in range(400):
        loads = np.zeros(64)
        for count in counts_T:
            loads[generator.choice(64, size=count, replace=False)] += 1
        squares.append(measures_of(loads, 1.0)["cv"] ** 2)
    expected = uniform_cv([np.bincount(counts_T)], num_experts=64)[0]
    assert np.sqrt(np.mean(squares)) == pytest.approx(expected, rel=0.03)


def test_a_token_that_keeps_every_expert_adds_no_noise() -> None:
    histogram = np.bincount([8] * 5)
    assert uniform_cv([histogram, histogram], num_experts=8).tolist() == [0.0, 0.0]


def test_layers_are_averaged_and_never_added_up() -> None:
    # Expert 0 of one layer and expert 1 of the other: added up they would look balanced.
    columns = load_columns(np.array([[4, 2], [2, 4]]), [[0, 6], [0, 6]])
    assert columns["expert_utilization_cv"] == pytest.approx(1 / 3)
    assert columns["expert_utilization_max_min_ratio"] == 2.0
    assert columns["expert_utilization_note"] == ""


def test_an_unused_expert_makes_the_ratio_nan_with_a_reason() -> None:
    columns = load_columns(np.array([[4, 2, 0], [2, 2, 2]]), [[0, 6], [0, 6]])
    assert np.isnan(columns["expert_utilization_max_min_ratio"])
    note = columns["expert_utilization_note"]
    assert note.startswith("1 of 2 layers left experts unused (up to 1 of 3)")
