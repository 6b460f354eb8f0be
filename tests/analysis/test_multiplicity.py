"""Corrections against hand and scipy; questions that couldn't be asked aren't counted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from bh_routing.analysis.multiplicity import benjamini_hochberg_exploratory, holm

P = [0.01, 0.04, 0.03, 0.005]


def test_holm_equals_the_steps_by_hand() -> None:
    assert holm(P).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_benjamini_hochberg_equals_scipys() -> None:
    assert benjamini_hochberg_exploratory(P) == pytest.approx(false_discovery_control(P))


def test_nan_stays_nan_and_is_not_counted() -> None:
    corrected = holm([*P, float("nan")])
    assert np.isnan(corrected[-1])
    assert corrected[:-1].tolist() == holm(P).tolist()


def test_nothing_to_correct_gives_nothing() -> None:
    assert holm([]).tolist() == []
    assert np.isnan(holm([float("nan")])).all()
