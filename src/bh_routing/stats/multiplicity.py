"""Adjustment of p-values for multiple testing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control

Floats = NDArray[np.float64]

BH_LABEL: Final = (
    "exploratory: Benjamini-Hochberg bounds the fraction of false finds, not the chance of one"
)


def holm(p: ArrayLike) -> Floats:
    """Adjust p-values by Holm's step-down procedure; NaN stays NaN and isn't counted as a test.

    Source: Holm (1979). Implemented here because statsmodels' `multipletests` runs the garbage
    collector on every call, which takes longer than the rest of a summary.

    Example:
        >>> holm([0.01, 0.04, float("nan")]).tolist()
        [0.02, 0.04, nan]
    """
    return _adjust(p, _holm)


def benjamini_hochberg_exploratory(p: ArrayLike) -> Floats:
    """Adjust p-values by Benjamini-Hochberg, for exploration only (`BH_LABEL`); NaN stays NaN."""
    return _adjust(p, lambda known_n: np.asarray(false_discovery_control(known_n, method="bh")))


def _holm(p_n: Floats) -> Floats:
    order = np.argsort(p_n, kind="stable")
    stepped_n = np.maximum.accumulate(p_n[order] * np.arange(len(p_n), 0, -1))
    adjusted_n = np.empty_like(p_n)
    adjusted_n[order] = np.minimum(stepped_n, 1.0)
    return adjusted_n


def _adjust(p: ArrayLike, rule: Callable[[Floats], Floats]) -> Floats:
    p_n = np.asarray(p, dtype=np.float64)
    adjusted_n = np.full_like(p_n, np.nan)
    asked = np.isfinite(p_n)
    if asked.any():
        adjusted_n[asked] = rule(p_n[asked])
    return adjusted_n
