"""Paired comparison of the accuracies of two rules on the same questions."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from bh_routing.errors import InputError
from bh_routing.stats.paired import check_confidence


class AccuracyComparison(NamedTuple):
    """Comparison of a rule's paired right-or-wrong outcomes with the reference's."""

    n: int
    accuracy: float
    reference_accuracy: float
    difference: float
    low: float
    high: float
    """Ends of the Bonett-Price interval of the difference."""
    gained: int
    """Wrong under the reference, right under the rule."""
    lost: int
    """Right under the reference, wrong under the rule."""
    share_flipped: float
    """(gained + lost) / n; equal accuracies can hide many flips."""
    p: float
    """Exact McNemar test; NaN if nothing flipped."""
    note: str


def compare_accuracies(
    right: ArrayLike, reference_right: ArrayLike, *, confidence: float = 0.95
) -> AccuracyComparison:
    """Compare outcomes question by question.

    The exact McNemar test has the null hypothesis that gains and losses are equally likely. The
    interval is the adjusted Wald interval, which holds its level even for few questions.

    Args:
        right: whether the rule answered each question correctly, booleans or 0 and 1.
        reference_right: the same for the reference, in the same order.
        confidence: level of the interval.
    Returns:
        The comparison; p equals `statsmodels.stats.contingency_tables.mcnemar(exact=True)`.
    Raises:
        InputError: lengths differ, or an outcome isn't right or wrong.
    Source: McNemar (1947); Bonett & Price (2012), J. Educ. Behav. Stat. 37:479, equation (3).
    Example:
        >>> c = compare_accuracies([1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0])
        >>> c.lost, c.gained, c.p
        (3, 0, 0.25)
    """
    check_confidence(confidence)
    rule_N, reference_N = _outcomes(right), _outcomes(reference_right)
    n = len(rule_N)
    if n != len(reference_N):
        raise InputError(
            f"outcomes need the same questions, got {n} and {len(reference_N)}; match them first"
        )
    gained, lost = int((rule_N & ~reference_N).sum()), int((~rule_N & reference_N).sum())
    both, neither = int((rule_N & reference_N).sum()), int((~rule_N & ~reference_N).sum())
    if n == 0:
        nan = math.nan
        return AccuracyComparison(0, nan, nan, nan, nan, nan, 0, 0, nan, nan, "No questions.")
    fraction_gained, fraction_lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = fraction_gained - fraction_lost
    variance = (fraction_gained + fraction_lost - centre**2) / (n + 2)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
    flipped = gained + lost
    p = (
        float(mcnemar([[both, lost], [gained, neither]], exact=True).pvalue)
        if flipped
        else math.nan
    )
    return AccuracyComparison(
        n=n,
        accuracy=(both + gained) / n,
        reference_accuracy=(both + lost) / n,
        difference=(gained - lost) / n,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
        gained=gained,
        lost=lost,
        share_flipped=flipped / n,
        p=p,
        note="" if flipped else f"No outcome of {n} flipped: there is nothing to test.",
    )


def _outcomes(values: ArrayLike) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    given_N = np.asarray(values)
    if given_N.ndim != 1 or not np.isin(given_N, (0, 1)).all():
        raise InputError("outcomes must be one list of True and False, or of 1 and 0")
    return given_N.astype(np.bool_)
