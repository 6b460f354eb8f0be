"""Which method speaks at which number of clusters, and what it then says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bh_routing.errors import InputError
from bh_routing.stats.clustered import (
    CLUSTER_T,
    NO_METHOD,
    NON_INFERIORITY_MARGIN,
    STUDENTIZED,
    estimate_ratio,
    minimum_detectable_effect,
    non_inferiority,
)


def test_few_clusters_of_equal_weight_give_scipys_one_sample_t() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 12)
    estimate, scipys = (
        estimate_ratio(values, np.ones(12), np.arange(12)),
        stats.ttest_1samp(values, 0),
    )
    interval = scipys.confidence_interval(0.9)
    ends = estimate.interval(0.9)
    assert estimate.method == CLUSTER_T
    assert [ends.low_R[0], ends.high_R[0]] == pytest.approx([interval.low, interval.high])
    assert estimate.p_different()[0] == pytest.approx(scipys.pvalue)
    below = stats.ttest_1samp(values, 0.5, alternative="less").pvalue
    assert estimate.p_below(0.5)[0] == pytest.approx(below)


@pytest.mark.parametrize(
    ("clusters", "method", "known"),
    [(1, NO_METHOD, False), (2, NO_METHOD, False), (3, CLUSTER_T, True), (19, CLUSTER_T, True),
     (20, STUDENTIZED, True)],
)  # fmt: skip
def test_the_number_of_clusters_and_not_of_documents_chooses_the_method(
    clusters: int, method: str, known: bool
) -> None:
    rng = np.random.default_rng(1)
    estimate = estimate_ratio(rng.normal(size=100), np.full(100, 9.0), np.arange(100) % clusters)
    assert (estimate.method, estimate.num_clusters) == (method, clusters)
    assert math.isfinite(estimate.interval().low_R[0]) == known
    assert math.isfinite(estimate.p_different()[0]) == known
    assert math.isfinite(estimate.p_below(0.1)[0]) == known
    assert bool(estimate.note) == (method != STUDENTIZED)


def test_chapters_of_one_book_count_less_than_as_many_books() -> None:
    rng = np.random.default_rng(2)
    book = np.repeat(np.arange(25), 8)
    values = rng.normal(0, 1, 25)[book] + rng.normal(0, 0.1, 200)
    ones = np.ones(200)
    clustered, naive = (
        estimate_ratio(values, ones, book),
        estimate_ratio(values, ones, np.arange(200)),
    )
    assert clustered.se_R[0] > 2 * naive.se_R[0]


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no document has a weight"):
        estimate_ratio([1.0], [0.0], ["a"])


def test_the_bound_of_non_inferiority_is_the_upper_end_of_the_90_per_cent_interval() -> None:
    rng = np.random.default_rng(3)
    estimate = estimate_ratio(rng.normal(size=(40, 3)), np.ones(40), np.arange(40))
    upper, p = non_inferiority(estimate, margin=0.2)
    np.testing.assert_array_equal(upper, estimate.interval(0.90).high_R)
    np.testing.assert_array_equal(p <= 0.05, upper <= 0.2)


def test_the_default_margin_is_one_per_cent_of_perplexity() -> None:
    assert math.exp(NON_INFERIORITY_MARGIN) == pytest.approx(1.01)


@pytest.mark.parametrize("margin", [0.0, -0.01, math.nan, math.inf])
def test_a_margin_that_is_no_positive_number_is_refused(margin: float) -> None:
    estimate = estimate_ratio([1.0, 2.0, 4.0], [1, 1, 1], [0, 1, 2])
    with pytest.raises(InputError, match="above 0"):
        non_inferiority(estimate, margin)


def test_without_enough_clusters_nothing_is_claimed() -> None:
    upper, p = non_inferiority(estimate_ratio([-9.0, -8.0], [1, 1], [0, 1]))
    assert math.isnan(upper[0]) and math.isnan(p[0])


@pytest.mark.parametrize("clusters", [3, 12, 42])
def test_a_true_mean_of_the_detectable_size_is_found_four_times_in_five(clusters: int) -> None:
    size = minimum_detectable_effect(0.5, clusters)
    line, df, shift = stats.t.ppf(0.975, clusters - 1), clusters - 1, size / 0.5
    power = stats.nct.sf(line, df, shift) + stats.nct.cdf(-line, df, shift)
    assert power == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(("error", "clusters"), [(0.0, 42), (math.nan, 42), (0.1, 2)])
def test_no_detectable_size_without_spread_or_clusters(error: float, clusters: int) -> None:
    assert math.isnan(minimum_detectable_effect(error, clusters))
