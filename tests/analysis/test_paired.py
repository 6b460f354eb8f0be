"""Paired estimates against scipy, and their refusals to invent numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bh_routing.errors import InputError
from bh_routing.stats.paired import mean_interval, paired_difference, signed_rank


def _pairs(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(4.5, 0.6, n), rng.normal(5.0, 0.3, n)


@pytest.mark.parametrize("n", [3, 12, 80])
def test_t_p_and_interval_equal_scipys_paired_t(n: int) -> None:
    x, y = _pairs(n)
    ours, scipys = paired_difference(x, y, confidence=0.9), stats.ttest_rel(x, y)
    interval = scipys.confidence_interval(0.9)
    assert [ours.t, ours.p, ours.df, ours.low, ours.high] == pytest.approx(
        [scipys.statistic, scipys.pvalue, scipys.df, interval.low, interval.high], rel=1e-12
    )


def test_cohens_d_is_t_over_the_root_of_n() -> None:
    x, y = _pairs(12)
    estimate = paired_difference(x, y)
    assert estimate.cohens_d == pytest.approx(estimate.t / math.sqrt(12), rel=1e-12)


def test_a_nan_pair_is_left_out_and_counted() -> None:
    x, y = _pairs(12)
    holed = x.copy()
    holed[3] = math.nan
    estimate, whole = (
        paired_difference(holed, y),
        paired_difference(np.delete(x, 3), np.delete(y, 3)),
    )
    assert (estimate.n, estimate.left_out, estimate.p) == (11, 1, whole.p)


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        ([4.0] * 12, [8.0] * 12, "All 12 differences equal -4"),
        ([0.1 + 0.2] * 12, [0.3] * 11 + [0.30000000000000004], "All 12 differences equal"),
        ([8.0] * 12, [8.0] * 12, "exactly 0"),
        ([1.0, 2.0], [2.0, 4.0], "2 complete pairs"),
        ([1.0], [2.0], "1 complete pair:"),
        ([], [], "0 complete pairs"),
    ],
)
def test_no_spread_or_too_few_pairs_give_nan_and_a_sentence(
    x: list[float], y: list[float], sentence: str
) -> None:
    estimate = paired_difference(x, y)
    unknown = (estimate.t, estimate.p, estimate.low, estimate.high, estimate.cohens_d)
    assert all(math.isnan(value) for value in (*unknown, estimate.wilcoxon_p))
    assert sentence in estimate.note


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(2,\) and \(3,\)"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_level_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(InputError, match="got 95"):
        mean_interval([1.0, 2.0, 3.0], confidence=95)


@pytest.mark.parametrize("n", [5, 12, 50])
def test_wilcoxon_without_ties_equals_scipys_exact_test(n: int) -> None:
    x, y = _pairs(n)
    p, method, _ = signed_rank(x - y)
    assert method == "exact"
    assert p == pytest.approx(stats.wilcoxon(x, y, method="exact").pvalue, rel=1e-12)


def test_wilcoxon_with_ties_equals_the_enumeration_of_all_signs() -> None:
    difference = np.array([1.0, -1.0, 2.0, 2.0, 3.0, -3.0, 4.0, 5.0, 0.0])
    nonzero = difference[difference != 0]
    ranks = stats.rankdata(np.abs(nonzero))
    signs = np.array(list(itertools.product([-1, 1], repeat=len(nonzero))))
    sums, observed = np.abs(signs @ ranks), abs(np.sign(nonzero) @ ranks)
    by_hand = float((sums >= observed - 1e-9).mean())
    p, method, _ = signed_rank(difference)
    assert method == "exact"
    assert p == pytest.approx(by_hand, rel=1e-12)


def test_forty_tied_differences_come_close_to_scipys_approximation() -> None:
    difference = np.random.default_rng(1).integers(-5, 7, 40).astype(float)
    nonzero = difference[difference != 0]
    assert 0.01 < signed_rank(difference)[0] < 0.99
    approximate = stats.wilcoxon(nonzero, method="approx", correction=True).pvalue
    assert signed_rank(difference)[0] == pytest.approx(approximate, rel=0.02)


def test_twelve_pairs_of_one_sign_reach_the_floor_of_the_exact_wilcoxon() -> None:
    p, _, floor = signed_rank(np.arange(1.0, 13.0))
    assert p == floor == pytest.approx(2 / 2**12)


def test_zero_differences_do_not_lower_the_floor() -> None:
    assert signed_rank([0.0, 0.0, 1.0, 2.0, 3.0])[2] == 0.25
    assert math.isnan(signed_rank([0.0, 0.0])[0])


def test_more_than_fifty_differences_take_scipys_approximation() -> None:
    difference = np.random.default_rng(1).integers(-3, 6, 80).astype(float)
    p, method, _ = signed_rank(difference)
    scipys = stats.wilcoxon(difference[difference != 0], method="approx")
    assert (p, method) == (scipys.pvalue, "approximate")
