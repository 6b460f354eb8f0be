from __future__ import annotations

import numpy as np
import pytest

from bh_routing.stats.load_balance import load_balance, uniform_router_cv, utilization_cv


def test_the_noise_value_is_what_a_uniform_router_shows_on_average() -> None:
    # 400 runs of 50 tokens, seed 0; the standard error of the mean square is below 1 %.
    generator = np.random.default_rng(0)
    counts_T1 = generator.integers(1, 9, size=(50, 1))
    squares = []
    for _ in range(400):
        loads = np.zeros(64, dtype=np.int64)
        for count in counts_T1[:, 0]:
            loads[generator.choice(64, size=count, replace=False)] += 1
        squares.append(utilization_cv(loads[None])[0] ** 2)
    expected = uniform_router_cv(counts_T1, num_experts=64)[0]
    assert np.sqrt(np.mean(squares)) == pytest.approx(expected, rel=0.03)


def test_a_token_that_keeps_every_expert_adds_no_noise() -> None:
    assert uniform_router_cv(np.full((5, 2), 8), num_experts=8).tolist() == [0.0, 0.0]


def test_layers_are_averaged_and_never_added_up() -> None:
    # Expert 0 of one layer and expert 1 of the other: added up they would look balanced.
    balance = load_balance(np.array([[4, 2], [2, 4]]), np.ones((6, 2), dtype=np.int64))
    assert balance.cv == pytest.approx(1 / 3)
    assert balance.max_min_ratio == 2.0
    assert balance.note == ""


def test_an_unused_expert_makes_the_ratio_nan_with_a_reason() -> None:
    balance = load_balance(np.array([[4, 2, 0], [2, 2, 2]]), np.ones((6, 2), dtype=np.int64))
    assert np.isnan(balance.max_min_ratio)
    assert balance.note.startswith("1 of 2 layers left experts unused (up to 1 of 3)")
