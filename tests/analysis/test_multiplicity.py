"""Corrections against hand and statsmodels; questions that couldn't be asked aren't counted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import ArrayLike
from statsmodels.stats.multitest import multipletests

from bh_routing.stats.paired import benjamini_hochberg_exploratory, holm

P = [0.01, 0.04, 0.03, 0.005]


def test_holm_equals_the_steps_by_hand() -> None:
    assert holm(P).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize(
    ("ours", "method"), [(holm, "holm"), (benjamini_hochberg_exploratory, "fdr_bh")]
)
def test_corrections_equal_statsmodels_with_ties_zeros_and_ones(
    ours: Callable[[ArrayLike], np.ndarray], method: str
) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 5, 40):
        p = np.round(rng.random(size) ** 3, 2)
        assert ours(p) == pytest.approx(multipletests(p, method=method)[1], rel=1e-12)
    assert ours([0.0, 1.0, 1.0]) == pytest.approx(multipletests([0.0, 1.0, 1.0], method=method)[1])


def test_nan_stays_nan_and_is_not_counted() -> None:
    corrected = holm([*P, float("nan")])
    assert np.isnan(corrected[-1])
    assert corrected[:-1].tolist() == holm(P).tolist()


def test_nothing_to_correct_gives_nothing() -> None:
    assert holm([]).tolist() == []
    assert np.isnan(holm([float("nan")])).all()
