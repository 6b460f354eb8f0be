"""Quantiles from a histogram over fixed, log-spaced bins.

Interpolation is log-linear within a bin, so the error of a quantile is at most one bin's width: a
factor of 10^(1/8) = 1.33 with the eight bins per decade of KL_BIN_EDGES, usually far less.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from bh_routing.errors import InputError
from bh_routing.results.records import KL_BIN_EDGES

RESOLUTION: Final = KL_BIN_EDGES[1] / KL_BIN_EDGES[0]
"""Ratio of the two edges of a bin: the largest error of a quantile, as a factor."""


def histogram_quantile(counts: ArrayLike, level: float, maximum: float) -> float:
    """Return a quantile of the tokens' KL from a histogram over KL_BIN_EDGES.

    Args:
        counts: tokens below the first edge, between each two edges, above the last.
        level: level of the quantile, in [0, 1].
        maximum: the largest observed value, stored exactly; it bounds the result.
    Returns:
        The quantile in nats, interpolated linearly below the first edge; NaN without tokens, or
        if the largest value is NaN.
    Raises:
        InputError: the number of bins doesn't fit the edges, or the level isn't in [0, 1].
    Example:
        >>> counts = [0] * 82
        >>> counts[57] = 10                      # ten tokens between 1e-1 and 1.33e-1 nats
        >>> round(histogram_quantile(counts, 0.5, maximum=0.13), 4)
        0.1155
    """
    if not 0 <= level <= 1:
        raise InputError(f"a quantile's level must be in [0, 1], got {level}")
    counts_B = np.asarray(counts, dtype=np.float64)
    if len(counts_B) != len(KL_BIN_EDGES) + 1:
        raise InputError(
            f"the histogram has {len(counts_B)} bins, this version keeps {len(KL_BIN_EDGES) + 1}; "
            "score again"
        )
    total = float(counts_B.sum())
    if total == 0 or math.isnan(maximum):
        return math.nan
    reached_B = np.cumsum(counts_B)
    rank = level * total
    bin_index = int(np.flatnonzero((reached_B >= rank) & (counts_B > 0))[0])
    share = (rank - (reached_B[bin_index] - counts_B[bin_index])) / counts_B[bin_index]
    if bin_index == 0:
        value = share * KL_BIN_EDGES[0]
    else:
        low = KL_BIN_EDGES[bin_index - 1]
        high = KL_BIN_EDGES[bin_index] if bin_index < len(KL_BIN_EDGES) else max(low, maximum)
        value = low * (high / low) ** share
    return min(float(value), maximum)
