"""Quantiles from the histogram against numpy's on the values themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bh_routing.analysis.quality_row import RESOLUTION, histogram_quantile
from bh_routing.errors import InputError
from bh_routing.results.records import KL_BIN_EDGES


def _histogram(values: np.ndarray) -> np.ndarray:
    bins = np.searchsorted(KL_BIN_EDGES, values, side="right")
    return np.bincount(bins, minlength=len(KL_BIN_EDGES) + 1)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_a_quantile_is_right_to_within_one_bin(level: float) -> None:
    values = np.random.default_rng(0).lognormal(-4.0, 2.0, 5000)
    ours = histogram_quantile(_histogram(values), level, float(values.max()))
    exact = float(np.quantile(values, level))
    assert abs(math.log(ours / exact)) < math.log(RESOLUTION)


def test_smooth_values_are_met_far_better_than_one_bin() -> None:
    values = np.random.default_rng(1).lognormal(-4.0, 2.0, 20_000)
    ours = histogram_quantile(_histogram(values), 0.5, float(values.max()))
    assert ours == pytest.approx(float(np.median(values)), rel=0.03)


def test_only_zeros_give_exactly_zero() -> None:
    assert histogram_quantile(_histogram(np.zeros(9)), 0.99, maximum=0.0) == 0.0


def test_no_quantile_exceeds_the_largest_value_even_beyond_the_last_edge() -> None:
    values = np.array([0.1, 150.0, 170.0])
    assert histogram_quantile(_histogram(values), 1.0, 170.0) == pytest.approx(170.0)
    assert histogram_quantile(_histogram(np.array([0.0101])), 0.99, 0.0101) == 0.0101


def test_an_empty_histogram_gives_nan() -> None:
    assert math.isnan(histogram_quantile(_histogram(np.array([])), 0.5, 0.0))


def test_other_bins_and_levels_are_refused() -> None:
    with pytest.raises(InputError, match="3 bins"):
        histogram_quantile([1, 2, 3], 0.5, 1.0)
    with pytest.raises(InputError, match="got 50"):
        histogram_quantile(_histogram(np.ones(3)), 50, 1.0)


def test_a_largest_value_of_nan_gives_nan() -> None:
    assert math.isnan(histogram_quantile(_histogram(np.array([0.1, 0.2])), 0.5, math.nan))


def test_a_largest_value_of_infinity_bounds_nothing_below_it() -> None:
    counts = _histogram(np.array([0.1, 0.2, math.inf]))
    assert histogram_quantile(counts, 1.0, math.inf) == math.inf
    assert histogram_quantile(counts, 0.3, math.inf) == pytest.approx(0.1, rel=RESOLUTION - 1)
