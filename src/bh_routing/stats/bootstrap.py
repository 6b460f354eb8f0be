"""Cluster bootstrap: intervals for ratios over documents, such as nats per token.

Axes: D documents, G clusters, R rules (columns), B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bh_routing.errors import InputError
from bh_routing.stats.paired import check_confidence

Floats = NDArray[np.float64]

RESAMPLES: Final = 10_000
_CHUNK_CELLS: Final = 2_000_000
"""Cells of the resamples held at a time: 16 MB, for any number of clusters."""
_UNDEFINED_SHARE: Final = 0.02
"""Largest fraction of resamples without spread, whose t is undefined; above it results are NaN."""
SPREAD_FLOOR: Final = 1e-12
"""A standard error below this fraction of the estimate is rounding, not variation."""


class ClusterSums(NamedTuple):
    """Sums over the documents of each cluster, without clusters of weight 0."""

    values_GR: Floats
    weights_G: Floats


class Ends(NamedTuple):
    """Both ends of an interval for each column."""

    low_R: Floats
    high_R: Floats


def sum_clusters(values: ArrayLike, weights: ArrayLike, clusters: ArrayLike) -> ClusterSums:
    """Add up values (D,) or (D, R) and weights (D,) over the documents of each cluster.

    Raises:
        InputError: lengths differ, a value isn't finite, or a weight is negative.
    """
    values_DR = np.asarray(values, dtype=np.float64)
    values_DR = values_DR[:, None] if values_DR.ndim == 1 else values_DR
    weights_D, clusters_D = np.asarray(weights, dtype=np.float64), np.asarray(clusters)
    if not len(values_DR) == len(weights_D) == len(clusters_D):
        raise InputError(
            f"documents need one value, weight and cluster each, got {len(values_DR)}, "
            f"{len(weights_D)} and {len(clusters_D)}"
        )
    if not (np.isfinite(values_DR).all() and np.isfinite(weights_D).all()):
        raise InputError("a document has a value or weight that isn't finite; leave it out first")
    if (weights_D < 0).any():
        raise InputError(f"weights must be at least 0, got {weights_D.min()}")
    used = weights_D > 0
    _, index_D = np.unique(clusters_D[used], return_inverse=True)
    num_clusters = int(index_D.max(initial=-1)) + 1
    values_GR = np.zeros((num_clusters, values_DR.shape[1]))
    np.add.at(values_GR, index_D, values_DR[used])
    weights_G = np.bincount(index_D, weights_D[used], minlength=num_clusters).astype(np.float64)
    return ClusterSums(values_GR, weights_G)


def cluster_standard_error(sums: ClusterSums) -> Floats:
    """Return the linearised cluster-robust standard error of sum(values) / sum(weights), (R,).

    sqrt(G / (G - 1) * sum_g (values_g - ratio * weights_g)^2) / sum(weights), as statsmodels gives
    for a weighted regression on a constant with `cov_type="cluster"`. NaN below 2 clusters.
    """
    num_clusters = len(sums.weights_G)
    if num_clusters < 2:
        return np.full(sums.values_GR.shape[1], math.nan)
    ratio_R = sums.values_GR.sum(axis=0) / sums.weights_G.sum()
    residual_GR = sums.values_GR - ratio_R * sums.weights_G[:, None]
    scale = num_clusters / (num_clusters - 1)
    error_R = np.sqrt(scale * (residual_GR**2).sum(axis=0)) / sums.weights_G.sum()
    return np.where(error_R <= SPREAD_FLOOR * np.abs(ratio_R), 0.0, error_R)


@dataclass(frozen=True, slots=True)
class ClusterBootstrap:
    """Resampled t of every column; all columns share the resamples, so they are paired."""

    estimate_R: Floats
    se_R: Floats
    """Cluster-robust standard error of the estimate."""
    t_BR: Floats
    """(resampled ratio - estimate) / its own cluster-robust standard error."""

    def interval(self, confidence: float = 0.95) -> Ends:
        """Return a two-sided studentised interval of the ratio per column; NaN without spread."""
        check_confidence(confidence)
        with np.errstate(invalid="ignore"):  # between two infinite t; set to NaN below
            t_2R = np.quantile(self.t_BR, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
            high_R, low_R = self.estimate_R - t_2R * self.se_R
        known_R = self._is_known_R()
        return Ends(np.where(known_R, low_R, np.nan), np.where(known_R, high_R, np.nan))

    def _is_known_R(self) -> NDArray[np.bool_]:
        undefined_R = (~np.isfinite(self.t_BR)).mean(axis=0)
        return np.asarray((self.se_R > 0) & (undefined_R <= _UNDEFINED_SHARE))

    def p_below(self, bound: float) -> Floats:
        """Return the one-sided p of "the ratio is `bound` or more", by studentised resamples.

        It is at most 5 % exactly where the upper end of the 90 % interval is at most the bound, up
        to one resample. The smallest possible value is 1 / (B + 1).
        """
        return self._tail(bound, from_below=True)

    def p_different(self, value: float = 0.0) -> Floats:
        """Return the two-sided p of "the ratio is `value`": twice the smaller tail, at most 1."""
        tails = [self._tail(value, from_below=below) for below in (True, False)]
        return np.asarray(np.minimum(1.0, 2 * np.minimum(*tails)))

    def _tail(self, value: float, *, from_below: bool) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            t_R = (self.estimate_R - value) / self.se_R
        beyond_BR = self.t_BR <= t_R if from_below else self.t_BR >= t_R
        p_R = (1 + beyond_BR.sum(axis=0)) / (len(self.t_BR) + 1)
        return np.where(self._is_known_R(), p_R, np.nan)


def cluster_bootstrap(
    values: ArrayLike,
    weights: ArrayLike,
    clusters: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ClusterBootstrap:
    """Bootstrap sum(values) / sum(weights) by drawing whole clusters with replacement.

    Give each document its own cluster for the ordinary bootstrap over documents, and weights of 1
    for a mean. Columns of `values` share the draws, so differences between rules stay paired.

    Args:
        values: sums over each document's tokens, shape (D,) or (D, R).
        weights: tokens of each document, shape (D,).
        clusters: the cluster of each document, shape (D,).
        resamples: B.
        seed: seed of the draws; the same seed gives the same interval.
    Returns:
        The distribution, for intervals and p-values of any level.
    Raises:
        InputError: fewer than 2 clusters, or inconsistent documents.
    Source: Efron & Tibshirani (1993), chapter 12.
    """
    sums = sum_clusters(values, weights, clusters)
    num_clusters = len(sums.weights_G)
    if num_clusters < 2:
        raise InputError(f"resampling needs at least 2 clusters, got {num_clusters}")
    y_GR, w_G = sums.values_GR, sums.weights_G
    estimate_R = y_GR.sum(axis=0) / w_G.sum()
    # Centred: squares don't cancel when the spread is small relative to the ratio.
    y_GR = y_GR - estimate_R * w_G[:, None]
    draws = draw_clusters(num_clusters, resamples, seed)
    t_BR = np.concatenate([_resample(y_GR, w_G, drawn_BG) for drawn_BG in draws])
    return ClusterBootstrap(estimate_R, cluster_standard_error(sums), t_BR)


def _resample(y_GR: Floats, w_G: Floats, drawn_BG: Floats) -> Floats:
    """Return the t of each resample's shift of the ratio, from centred values."""
    num_clusters = len(w_G)
    total_B1 = (drawn_BG @ w_G)[:, None]
    shift_BR = (drawn_BG @ y_GR) / total_B1
    squares_BR = (
        drawn_BG @ y_GR**2
        - 2 * shift_BR * (drawn_BG @ (y_GR * w_G[:, None]))
        + shift_BR**2 * (drawn_BG @ w_G**2)[:, None]
    )
    scale = num_clusters / (num_clusters - 1)
    error_BR = np.sqrt(scale * np.maximum(squares_BR, 0.0)) / total_B1
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(shift_BR == 0, 0.0, shift_BR / error_BR)


def draw_clusters(num_clusters: int, resamples: int, seed: int) -> Iterable[Floats]:
    """Return how often each resample draws each cluster, in chunks of rows."""
    if num_clusters * resamples <= _CHUNK_CELLS:
        return _small_draws(num_clusters, resamples, seed)
    return _fresh_draws(num_clusters, resamples, seed)


@lru_cache(maxsize=8)
def _small_draws(num_clusters: int, resamples: int, seed: int) -> tuple[Floats, ...]:
    # A table needs the same draws for every rule and metric, and drawing is most of the work.
    draws = tuple(_fresh_draws(num_clusters, resamples, seed))
    for drawn_BG in draws:
        drawn_BG.setflags(write=False)
    return draws


def _fresh_draws(num_clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    rng = np.random.default_rng(seed)
    uniform = np.full(num_clusters, 1 / num_clusters)
    rows = max(1, _CHUNK_CELLS // num_clusters)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        yield rng.multinomial(num_clusters, uniform, size=size).astype(np.float64)
