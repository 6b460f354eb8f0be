"""How evenly the experts of each layer were used, and what chance alone would show.

Axes: L layers, E experts, T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class LoadBalance(NamedTuple):
    """Utilisation of one experiment, per layer and then averaged over layers."""

    cv: float
    cv_noise: float
    max_min_ratio: float
    note: str
    """Why the ratio is NaN, empty if it isn't."""


def utilization_cv(assignments_LE: NDArray[np.integer]) -> NDArray[np.float64]:
    """Coefficient of variation (std / mean, denominator n) of assignments in each layer.

    Example:
        >>> utilization_cv(np.array([[2, 2, 2, 2], [4, 4, 0, 0]])).tolist()
        [0.0, 1.0]
    """
    loads_LE = assignments_LE.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(loads_LE.std(axis=1) / loads_LE.mean(axis=1))


def uniform_router_cv(
    expert_counts_TL: NDArray[np.integer], num_experts: int
) -> NDArray[np.float64]:
    """Coefficient of variation that a router without preferences shows in each layer.

    A token that keeps c of E experts at random adds a Bernoulli(c/E) to each expert's load, so a
    load has variance sum_t c/E (1 - c/E) around the mean sum_t c/E. The value is the root of the
    expected squared coefficient; tokens are independent, the c experts of one token are distinct.

    Args:
        expert_counts_TL: experts kept by each token in each layer.
        num_experts: E.
    Returns:
        float64, shape (L,); NaN where a layer kept nothing.
    Example:
        >>> uniform_router_cv(np.full((8, 1), 2), num_experts=4).round(4).tolist()
        [0.3536]
    """
    share_TL = expert_counts_TL.astype(np.float64) / num_experts
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt((share_TL * (1 - share_TL)).sum(axis=0)) / share_TL.sum(axis=0))


def load_balance(
    assignments_LE: NDArray[np.integer], expert_counts_TL: NDArray[np.integer]
) -> LoadBalance:
    """Summarise the load of one experiment: each measure per layer, then the mean over layers.

    Expert 5 of two layers isn't one expert, so layers are never added up.
    """
    num_experts = assignments_LE.shape[1]
    unused_L = (assignments_LE == 0).sum(axis=1)
    note, ratio = "", float("nan")
    if unused_L.any():
        note = (
            f"{int((unused_L > 0).sum())} of {len(unused_L)} layers left experts unused (up to "
            f"{int(unused_L.max())} of {num_experts}), so max/min has no finite value"
        )
    else:
        ratio = float((assignments_LE.max(axis=1) / assignments_LE.min(axis=1)).mean())
    return LoadBalance(
        cv=float(utilization_cv(assignments_LE).mean()),
        cv_noise=float(uniform_router_cv(expert_counts_TL, num_experts).mean()),
        max_min_ratio=ratio,
        note=note,
    )
