"""Corrections for having asked several questions at once."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from statsmodels.stats.multitest import multipletests

BH_LABEL = "exploratory: Benjamini-Hochberg bounds the share of false finds, not the chance of one"


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values by Holm's step-down rule; NaN stays NaN and isn't counted as a question.

    Example:
        >>> holm([0.01, 0.04, float("nan")]).tolist()
        [0.02, 0.04, nan]
    """
    return _adjust(p, "holm")


def benjamini_hochberg_exploratory(p: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values by Benjamini-Hochberg, for exploring only (`BH_LABEL`); NaN stays NaN."""
    return _adjust(p, "fdr_bh")


def _adjust(p: ArrayLike, method: Literal["holm", "fdr_bh"]) -> NDArray[np.float64]:
    p_n = np.asarray(p, dtype=np.float64)
    adjusted_n = np.full_like(p_n, np.nan)
    asked = np.isfinite(p_n)
    if asked.any():
        adjusted_n[asked] = multipletests(p_n[asked], method=method)[1]
    return adjusted_n
