"""Paired comparisons of means and of accuracies, and correction for several of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bh_routing.errors import InputError

Floats = NDArray[np.float64]

MIN_PAIRS: Final = 3
"""Fewer pairs give no interval and no test: two points leave one degree of freedom."""

EXACT_PAIRS: Final = 50
"""Up to this many nonzero differences the signed-rank test is exact."""
BH_LABEL: Final = (
    "exploratory: Benjamini-Hochberg bounds the fraction of false finds, not the chance of one"
)
_SPREAD_FLOOR: Final = 1e-12
"""A spread below this fraction of the values' magnitude is rounding, not variation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedEstimate:
    """The mean of x - y over pairs, with interval, tests and effect size."""

    n: int
    """Pairs with both values finite."""
    left_out: int
    """Pairs with a missing or infinite value."""
    mean: float
    sd: float
    """Standard deviation of the differences, denominator n - 1."""
    low: float
    high: float
    """Ends of the t interval of the mean."""
    t: float = math.nan
    df: float = math.nan
    p: float = math.nan
    """Two-sided paired t test of mean difference 0."""
    cohens_d: float = math.nan
    """d_z = mean / sd of the differences: the effect size for paired data."""
    wilcoxon_p: float = math.nan
    """Two-sided signed-rank test; zero differences are dropped."""
    wilcoxon_method: str = "none"
    """exact, approximate or none."""
    wilcoxon_floor: float = math.nan
    """The smallest p an exact signed-rank test can give here: 2 / 2^(nonzero differences)."""
    note: str = ""
    """One sentence on missing statistics and the reason; empty if none is missing."""


class MeanInterval(NamedTuple):
    """A mean with its t interval; NaN if there is none."""

    n: int
    mean: float
    sd: float
    low: float
    high: float


def paired_difference(x: ArrayLike, y: ArrayLike, *, confidence: float = 0.95) -> PairedEstimate:
    """Estimate the mean of x - y over pairs, with interval, paired t, Wilcoxon and Cohen's d_z.

    A pair with a missing value is left out and counted. If all differences are equal, they have no
    spread: interval, tests and d are NaN and the note gives the reason.

    Args:
        x: values of the condition of interest, shape (n,).
        y: values of the reference for the same units in the same order.
        confidence: level of the interval, in (0, 1).
    Returns:
        The estimate; t and p equal `scipy.stats.ttest_rel`.
    Raises:
        InputError: lengths differ, or confidence is outside (0, 1).
    Source: d_z in Lakens (2013), Frontiers in Psychology 4:863, equation (6).
    Example:
        >>> e = paired_difference([4.0, 5.0, 6.5], [8.0, 8.0, 8.0])
        >>> round(e.mean, 3), round(e.cohens_d, 3)
        (-2.833, -2.252)
    """
    check_confidence(confidence)
    x_n, y_n = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x_n.ndim != 1 or x_n.shape != y_n.shape:
        raise InputError(
            f"pairs need two lists of one length, got shapes {x_n.shape} and {y_n.shape}; "
            "match the values by what was measured first"
        )
    both = np.isfinite(x_n) & np.isfinite(y_n)
    difference_n = (x_n - y_n)[both]
    n, left_out = int(both.sum()), int((~both).sum())
    interval = mean_interval(difference_n, confidence=confidence)
    scale = float(np.abs(np.concatenate([x_n[both], y_n[both]])).max()) if n else 0.0
    if note := _why_untestable(difference_n, scale):
        return PairedEstimate(
            n=n, left_out=left_out, mean=interval.mean, sd=interval.sd, low=math.nan,
            high=math.nan, note=note,
        )  # fmt: skip
    test = stats.ttest_1samp(difference_n, 0.0)
    rank_p, method, floor = signed_rank(difference_n)
    return PairedEstimate(
        n=n,
        left_out=left_out,
        mean=interval.mean,
        sd=interval.sd,
        low=interval.low,
        high=interval.high,
        t=float(test.statistic),
        df=float(n - 1),
        p=float(test.pvalue),
        cohens_d=interval.mean / interval.sd,
        wilcoxon_p=rank_p,
        wilcoxon_method=method,
        wilcoxon_floor=floor,
    )


def mean_interval(values: ArrayLike, *, confidence: float = 0.95) -> MeanInterval:
    """Return mean, standard deviation (n - 1) and t interval of the mean of the finite values.

    Below 3 values, or if all are equal, the interval is NaN.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0]).sd
        1.0
    """
    check_confidence(confidence)
    known_n = np.asarray(values, dtype=np.float64)
    known_n = known_n[np.isfinite(known_n)]
    n = len(known_n)
    mean = float(known_n.mean()) if n else math.nan
    sd = float(known_n.std(ddof=1)) if n > 1 else math.nan
    if _why_untestable(known_n, float(np.abs(known_n).max()) if n else 0.0):
        return MeanInterval(n, mean, sd, math.nan, math.nan)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return MeanInterval(n, mean, sd, mean - half, mean + half)


def signed_rank(difference_n: Sequence[float] | NDArray[np.float64]) -> tuple[float, str, float]:
    """Run the two-sided Wilcoxon signed-rank test.

    It is exact up to 50 nonzero differences, with or without ties; above, it is scipy's normal
    approximation. Zeros are dropped (Wilcoxon's own rule) and ties get their mean rank.

    Returns:
        p, the method (exact, approximate or none) and the smallest p of an exact test.
    Example:
        >>> signed_rank([1.0, 2.0, 3.0, 4.0, 5.0])
        (0.0625, 'exact', 0.0625)
    """
    nonzero_n = np.asarray(difference_n, dtype=np.float64)
    nonzero_n = nonzero_n[nonzero_n != 0]
    n = len(nonzero_n)
    if n == 0:
        return math.nan, "none", math.nan
    floor = signed_rank_floor(n)
    if n > EXACT_PAIRS:
        p = float(stats.wilcoxon(nonzero_n, method="approx").pvalue)
        return p, "approximate", floor
    return _exact_signed_rank(nonzero_n), "exact", floor


def _exact_signed_rank(nonzero_n: NDArray[np.float64]) -> float:
    """Return the two-sided p by counting the sign patterns that give each rank sum.

    With ties, scipy is exact only by enumerating all 2^n patterns: seconds for twelve prompts.
    """
    # Twice the rank: mean ranks of ties are halves, and the sums below must be integers.
    rank_n = np.rint(2 * stats.rankdata(np.abs(nonzero_n))).astype(np.int64)
    fraction_of_sum = np.ones(1)
    for rank in rank_n:
        longer = np.zeros(len(fraction_of_sum) + rank)
        longer[: len(fraction_of_sum)] += fraction_of_sum / 2
        longer[rank:] += fraction_of_sum / 2
        fraction_of_sum = longer
    positive = int(rank_n[nonzero_n > 0].sum())
    tail = min(fraction_of_sum[: positive + 1].sum(), fraction_of_sum[positive:].sum())
    return float(min(1.0, 2 * tail))


def signed_rank_floor(num_nonzero: int) -> float:
    """Return the smallest two-sided p of an exact signed-rank test: all differences of one sign.

    Example:
        >>> round(signed_rank_floor(12), 6)
        0.000488
    """
    return min(1.0, 2.0 / 2.0**num_nonzero)


def check_confidence(confidence: float) -> None:
    """Raise InputError unless the level of an interval is in (0, 1)."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be in (0, 1), got {confidence}; the usual one is 0.95")


def _why_untestable(difference_n: NDArray[np.float64], scale: float) -> str:
    n = len(difference_n)
    if n < MIN_PAIRS:
        return f"{n} complete pair{'' if n == 1 else 's'}: tests and intervals need {MIN_PAIRS}."
    if np.all(difference_n == 0):
        return f"All {n} differences are exactly 0: there is nothing to test."
    if float(np.ptp(difference_n)) <= _SPREAD_FLOOR * scale:
        return (
            f"All {n} differences equal {difference_n[0]:g}: with no spread there is no test, "
            "no interval and no effect size."
        )
    return ""


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

    The exact McNemar test, a binomial test of the flips, has the null hypothesis that gains and
    losses are equally likely. The interval is the adjusted Wald interval, which holds its level
    even for few questions.

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
    if n == 0:
        nan = math.nan
        return AccuracyComparison(0, nan, nan, nan, nan, nan, 0, 0, nan, nan, "No questions.")
    fraction_gained, fraction_lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = fraction_gained - fraction_lost
    variance = (fraction_gained + fraction_lost - centre**2) / (n + 2)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt(variance)
    flipped = gained + lost
    p = float(stats.binomtest(lost, flipped).pvalue) if flipped else math.nan
    return AccuracyComparison(
        n=n,
        accuracy=float(rule_N.mean()),
        reference_accuracy=float(reference_N.mean()),
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


def holm(p: ArrayLike) -> Floats:
    """Adjust p-values by Holm's step-down procedure; NaN stays NaN and isn't counted as a test.

    Source: Holm (1979). Implemented here because statsmodels' `multipletests` runs the garbage
    collector on every call, which takes longer than the rest of a summary.

    Example:
        >>> holm([0.01, 0.04, float("nan")]).tolist()
        [0.02, 0.04, nan]
    """
    p_n = np.asarray(p, dtype=np.float64)
    order = np.argsort(p_n, kind="stable")  # NaN last
    factor_n = np.arange(int(np.isfinite(p_n).sum()), 0, -1)
    stepped_n = np.maximum.accumulate(p_n[order][: len(factor_n)] * factor_n)
    adjusted_n = np.full_like(p_n, np.nan)
    adjusted_n[order[: len(factor_n)]] = np.minimum(stepped_n, 1.0)
    return adjusted_n


def benjamini_hochberg_exploratory(p: ArrayLike) -> Floats:
    """Adjust p-values by Benjamini-Hochberg, for exploration only (`BH_LABEL`); NaN stays NaN."""
    p_n = np.asarray(p, dtype=np.float64)
    adjusted_n, known = np.full_like(p_n, np.nan), np.isfinite(p_n)
    adjusted_n[known] = stats.false_discovery_control(p_n[known], method="bh")
    return adjusted_n
