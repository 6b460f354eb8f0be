"""Paired accuracies against scipy's binomial test and a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bh_routing.errors import InputError
from bh_routing.stats.paired import compare_accuracies


def _pair(seed: int = 0, n: int = 200) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.random(n) < 0.7
    return np.where(rng.random(n) < 0.15, ~reference, reference), reference


def test_p_equals_the_binomial_test_of_gains_against_losses() -> None:
    right, reference = _pair()
    ours = compare_accuracies(right, reference)
    flips = ours.gained + ours.lost
    assert flips > 10
    assert ours.p == pytest.approx(stats.binomtest(ours.gained, flips).pvalue, rel=1e-12)


def test_accuracies_and_flips_are_counted_question_by_question() -> None:
    ours = compare_accuracies([1, 1, 0, 0, 1], [1, 0, 1, 0, 1])
    assert (ours.accuracy, ours.reference_accuracy, ours.difference) == (0.6, 0.6, 0.0)
    assert (ours.gained, ours.lost, ours.share_flipped) == (1, 1, 0.4)


def test_no_flip_gives_nan_and_a_sentence() -> None:
    ours = compare_accuracies([1, 0, 1], [1, 0, 1])
    assert math.isnan(ours.p)
    assert "No outcome of 3 flipped" in ours.note


def test_no_questions_give_nan() -> None:
    assert math.isnan(compare_accuracies([], []).difference)


@pytest.mark.parametrize("n", [30, 150])
def test_the_interval_holds_the_true_difference_about_95_per_cent_of_the_time(n: int) -> None:
    # 2,000 data sets: one standard error of the share is 0.5 points; Bonett-Price errs to longer.
    rng = np.random.default_rng(9)
    outcomes = rng.choice(4, p=[0.6, 0.12, 0.05, 0.23], size=(2000, n))
    truth, held = 0.05 - 0.12, 0
    for row in outcomes:
        ours = compare_accuracies((row == 0) | (row == 2), (row == 0) | (row == 1))
        held += ours.low <= truth <= ours.high
    assert 0.935 <= held / 2000 <= 0.985


@pytest.mark.parametrize(
    ("right", "reference", "message"),
    [([1, 0], [1], "2 and 1"), ([0.5, 1.0], [1, 0], "True and False")],
)
def test_outcomes_that_do_not_pair_are_refused(
    right: list[float], reference: list[float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare_accuracies(right, reference)
