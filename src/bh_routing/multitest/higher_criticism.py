"""Higher Criticism: how far the number of small p-values exceeds what chance gives.

Axes: any leading axes, then E hypotheses; written `..E`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

# Keeps the denominator away from 0 where a p-value is 0 or 1, far below any p-value of a table.
_SMALLEST_VARIANCE: Final = 1e-300


def higher_criticism(sorted_p_E: Tensor) -> Tensor:
    """Return sqrt(E) (i/E - p_(i)) / sqrt(p_(i) (1 - p_(i))) for each rank i.

    Args:
        sorted_p_E: p-values in [0, 1], ascending, shape (..., E).
    Returns:
        float64 tensor of the same shape; at a fixed rank it falls as the p-value rises.
    Source: Donoho & Jin (2004), "Higher Criticism for Detecting Sparse Heterogeneous Mixtures",
        equation (1.5) before the maximum is taken.
    Example:
        >>> [round(hc, 2) for hc in higher_criticism(torch.tensor([0.01, 0.5, 0.5, 0.9])).tolist()]
        [4.82, 0.0, 1.0, 0.67]
    """
    p_E = sorted_p_E.to(torch.float64)
    num_hypotheses = p_E.shape[-1]
    rank_E = torch.arange(1, num_hypotheses + 1, dtype=torch.float64, device=p_E.device)
    variance_E = (p_E * (1.0 - p_E)).clamp_min(_SMALLEST_VARIANCE)
    return (rank_E / num_hypotheses - p_E) * (num_hypotheses / variance_E).sqrt()


def criticism_reaches(sorted_p_E: Tensor, threshold: float) -> Tensor:
    """Say for each rank whether its criticism is at least `threshold`."""
    return higher_criticism(sorted_p_E) >= threshold
