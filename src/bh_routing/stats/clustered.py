"""What may be said of a ratio over documents, given how many independent clusters there are.

20 clusters or more: studentised cluster bootstrap. 3 to 19: cluster-robust t with G - 1 degrees of
freedom. Fewer: the estimate alone, NaN and a sentence.

Measured on 9,000 simulated data sets a row, books of 1 to about 4 chapters with log-normal lengths:
the share of 95 % intervals that hold the truth, and how often harm that lies at the margin is
claimed harmless (one-sided, nominal 5 %). The tests marked `full` in test_coverage.py repeat it.

    clusters   effects by cluster   coverage   claimed at the margin
    40         normal               0.946      0.053
    40         exponential          0.941      0.067
    40         log-normal, s 0.8    0.930      0.082
    100        normal               0.946      0.053
    100        exponential          0.939      0.063
    100        log-normal, s 0.8    0.936      0.068

Percentile and BCa intervals are too short at these counts: 0.929 and 0.922 with 40 exponential
clusters. And whatever the method, a long tail of documents that a rule harms badly makes a claim of
harmlessness a little too easy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from statsmodels.stats.power import TTestPower

from bh_routing.errors import InputError
from bh_routing.stats.bootstrap import (
    RESAMPLES,
    ClusterBootstrap,
    Ends,
    Floats,
    cluster_bootstrap,
    cluster_standard_error,
    sum_clusters,
)
from bh_routing.stats.paired import check_confidence

BOOTSTRAP_CLUSTERS: Final = 20
"""Below this many clusters resampling them says less than the t distribution does."""
MIN_CLUSTERS: Final = 3
NON_INFERIORITY_MARGIN: Final = math.log(1.01)
"""One per cent of perplexity, in nats a token."""

STUDENTIZED: Final = "studentised cluster bootstrap"
CLUSTER_T: Final = "cluster t"
NO_METHOD: Final = "none"


@dataclass(frozen=True, slots=True)
class RatioEstimate:
    """sum(values) / sum(weights) for every column, with what its uncertainty allows.

    Axes: R columns, G clusters.
    """

    estimate_R: Floats
    se_R: Floats
    """Cluster-robust standard error; NaN under 2 clusters."""
    num_documents: int
    num_clusters: int
    method: str
    note: str
    """Why there is no interval, or why it isn't a bootstrap; empty if it is."""
    bootstrap: ClusterBootstrap | None

    def interval(self, confidence: float = 0.95) -> Ends:
        """Return both ends for every column; NaN where there are too few clusters or no spread."""
        check_confidence(confidence)
        if self.bootstrap is not None:
            return self.bootstrap.interval(confidence)
        half_R = self._t_quantile((1 + confidence) / 2) * self._spread_R()
        return Ends(self.estimate_R - half_R, self.estimate_R + half_R)

    def p_different(self, value: float = 0.0) -> Floats:
        """Two-sided p of "the ratio is `value`" for every column."""
        if self.bootstrap is not None:
            return self.bootstrap.p_different(value)
        with np.errstate(invalid="ignore"):
            t_R = (self.estimate_R - value) / self._spread_R()
        return np.asarray(2 * stats.t.sf(np.abs(t_R), max(1, self.num_clusters - 1)))

    def p_below(self, bound: float) -> Floats:
        """One-sided p of "the ratio is `bound` or more" for every column."""
        if self.bootstrap is not None:
            return self.bootstrap.p_below(bound)
        with np.errstate(invalid="ignore"):
            t_R = (self.estimate_R - bound) / self._spread_R()
        return np.asarray(stats.t.cdf(t_R, max(1, self.num_clusters - 1)))

    def _spread_R(self) -> Floats:
        """The standard error where tests may use it, else NaN."""
        usable_R = (self.se_R > 0) & (self.num_clusters >= MIN_CLUSTERS)
        return np.where(usable_R, self.se_R, np.nan)

    def _t_quantile(self, level: float) -> float:
        return float(stats.t.ppf(level, max(1, self.num_clusters - 1)))


def estimate_ratio(
    values: ArrayLike,
    weights: ArrayLike,
    clusters: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RatioEstimate:
    """Estimate sum(values) / sum(weights) over documents, clusters being the independent units.

    Args:
        values: sums over each document's tokens, shape (D,) or (D, R).
        weights: tokens of each document, shape (D,); documents of weight 0 are left out.
        clusters: the cluster of each document, shape (D,).
        resamples: of the bootstrap.
        seed: of the bootstrap.
    Returns:
        The estimate of every column, by the method that the number of clusters allows.
    Raises:
        InputError: the documents don't fit together, or none has a weight.
    Example:
        >>> e = estimate_ratio([3.0, 1.0, 2.0], [10, 10, 20], ["a", "b", "c"])
        >>> e.method, float(e.estimate_R[0])
        ('cluster t', 0.15)
    """
    sums = sum_clusters(values, weights, clusters)
    num_clusters = len(sums.weights_G)
    if num_clusters == 0:
        raise InputError("no document has a weight above 0: there is nothing to estimate")
    bootstrap, method, note = None, NO_METHOD, ""
    if num_clusters >= BOOTSTRAP_CLUSTERS:
        method = STUDENTIZED
        bootstrap = cluster_bootstrap(values, weights, clusters, resamples=resamples, seed=seed)
    elif num_clusters >= MIN_CLUSTERS:
        method = CLUSTER_T
        note = f"{num_clusters} clusters: cluster t, for a bootstrap needs {BOOTSTRAP_CLUSTERS}."
    else:
        note = (
            f"{num_clusters} cluster{'s' * (num_clusters > 1)}: no interval and no test, they "
            f"need {MIN_CLUSTERS}."
        )
    return RatioEstimate(
        estimate_R=sums.values_GR.sum(axis=0) / sums.weights_G.sum(),
        se_R=cluster_standard_error(sums),
        num_documents=int((np.asarray(weights) > 0).sum()),
        num_clusters=num_clusters,
        method=method,
        note=note,
        bootstrap=bootstrap,
    )


class NonInferiority(NamedTuple):
    """Is the harm below the margin? One entry a column; upper and p are NaN where unknown."""

    margin: float
    upper_R: Floats
    """One-sided 95 % upper bound: the upper end of the two-sided 90 % interval."""
    p_R: Floats
    """One-sided p of "the harm is the margin or more"."""
    is_non_inferior_R: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """upper <= margin; False where unknown, which isn't a finding of harm."""


def non_inferiority(delta: RatioEstimate, margin: float = NON_INFERIORITY_MARGIN) -> NonInferiority:
    """Test whether an increase of loss stays within `margin`, at one-sided 5 %.

    Args:
        delta: mean increase over the reference, in the margin's unit; more is worse.
        margin: largest increase that still counts as none, above 0.
    Returns:
        Bound, p and verdict of every column.
    Raises:
        InputError: the margin isn't a positive number.
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise InputError(f"the margin must be a number above 0, got {margin}; the usual is ln 1.01")
    upper_R = delta.interval(0.90).high_R
    return NonInferiority(margin, upper_R, delta.p_below(margin), upper_R <= margin)


def minimum_detectable_effect(
    standard_error: float, num_clusters: int, *, alpha: float = 0.05, power: float = 0.8
) -> float:
    """Smallest true mean that a two-sided t test over clusters finds with probability `power`.

    A difference below it may well be there and not be seen: "not significant" then says little.

    Args:
        standard_error: of the mean, from these data.
        num_clusters: independent units behind it.
        alpha: level of the test.
        power: wished probability of finding it.
    Returns:
        In the unit of the standard error; NaN under 3 clusters or without spread.
    Example:
        >>> round(minimum_detectable_effect(1.0, 42), 3)
        2.869
    """
    if num_clusters < MIN_CLUSTERS or not standard_error > 0:
        return math.nan
    size = TTestPower().solve_power(
        effect_size=None, nobs=num_clusters, alpha=alpha, power=power, alternative="two-sided"
    )
    return float(np.squeeze(size)) * math.sqrt(num_clusters) * standard_error
