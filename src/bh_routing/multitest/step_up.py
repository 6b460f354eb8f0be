"""Step-up procedures on tensors of p-values, and higher criticism."""

from __future__ import annotations

from functools import cache
from numbers import Real
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from bh_routing.errors import InputError

Procedure = Literal["bh", "by", "storey"]
"""bh: Benjamini-Hochberg; by: Benjamini-Yekutieli, which holds under any dependence; storey:
Benjamini-Hochberg with the fraction of true null hypotheses estimated from the large p-values."""

STOREY_LAMBDA: Final = 0.5
"""p-values above lambda estimate the number of true null hypotheses; none of them is rejected."""


def check_alpha(alpha: float) -> None:
    """Raise InputError unless alpha is a number in (0, 1)."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise InputError(f"alpha must be a number in (0, 1), got {alpha!r}")
    if not 0.0 < alpha < 1.0:
        raise InputError(f"alpha must be in (0, 1), got {alpha}; 0.05 is a usual choice")


@cache
def harmonic_number(num_hypotheses: int) -> float:
    """Sum 1/i for i from 1 to E, in the same order as scipy."""
    return float(np.sum(1.0 / np.arange(1, num_hypotheses + 1, dtype=np.float64)))


def on_or_below_line(sorted_p_E: Tensor, alpha: float, procedure: Procedure = "bh") -> Tensor:
    """Return, for each rank, whether its p-value is on or below the procedure's step-up line.

    No validation and no host sync: selectors and critical values are built on it.

    Args:
        sorted_p_E: float64 p-values, ascending along the last axis, shape (..., E).
        alpha: target false discovery rate, in (0, 1).
        procedure: "bh", "by" or "storey".
    Returns:
        Bool tensor of the same shape.
    """
    if procedure == "storey":
        num_large_1 = (sorted_p_E > STOREY_LAMBDA).sum(dim=-1, keepdim=True)
        return on_or_below_storey_line(sorted_p_E, alpha, num_large_1)
    num_hypotheses = sorted_p_E.shape[-1]
    rank_E = torch.arange(1, num_hypotheses + 1, dtype=torch.float64, device=sorted_p_E.device)
    # Tensor over tensor: number / tensor is number * (1 / tensor), with one more rounding.
    scaled_E = sorted_p_E * (torch.full_like(rank_E, num_hypotheses) / rank_E)
    if procedure == "by":
        scaled_E = scaled_E * harmonic_number(num_hypotheses)
    return scaled_E <= alpha


def on_or_below_storey_line(p_E: Tensor, alpha: float, num_large: Tensor) -> Tensor:
    """Return, for each rank, whether a p-value is on or below Storey's step-up line.

    The line is that of Benjamini-Hochberg divided by the estimated fraction of true null
    hypotheses, (1 + num_large) / (E (1 - lambda)), which may exceed 1; no p-value above lambda is
    rejected.

    Args:
        p_E: float64 p-values by rank, shape (..., E).
        alpha: target false discovery rate, in (0, 1).
        num_large: number of p-values of the row above lambda, shape (..., 1).
    Returns:
        Bool tensor, the two shapes broadcast.
    Source: Storey, Taylor & Siegmund (2004), equations (6) and (13), theorem 3.
    """
    num_hypotheses = p_E.shape[-1]
    null_fraction = (1.0 + num_large) / (num_hypotheses * (1.0 - STOREY_LAMBDA))
    rank_E = torch.arange(1, num_hypotheses + 1, dtype=torch.float64, device=p_E.device)
    scaled_E = p_E * (torch.full_like(rank_E, num_hypotheses) / rank_E) * null_fraction
    return (scaled_E <= alpha) & (p_E <= STOREY_LAMBDA)


def ranks(num_hypotheses: int, device: torch.device) -> Tensor:
    """Return the ranks 1, 2, ..., E as int64, for `last_true_rank`."""
    return torch.arange(1, num_hypotheses + 1, device=device)


def last_true_rank(is_below_E: Tensor, rank_E: Tensor) -> Tensor:
    """Return the largest rank whose entry is True, 0 if none is; int64, shape (..., 1)."""
    return (is_below_E * rank_E).amax(dim=-1, keepdim=True)


def count_rejected(p_values: Tensor, alpha: float, procedure: Procedure = "bh") -> Tensor:
    """Count the hypotheses that a step-up procedure rejects in each row.

    The count is the largest k with p_(k) <= k * alpha / E; a p-value on the line counts.

    Args:
        p_values: in [0, 1], floating, shape (..., E), in any order within a row.
        alpha: target false discovery rate, in (0, 1).
        procedure: "bh"; "by" with the line divided by 1 + 1/2 + ... + 1/E; or "storey".
    Returns:
        Int64 tensor of shape (...), values 0 to E.
    Raises:
        InputError: alpha is outside (0, 1), or a p-value is NaN or outside [0, 1].
    Source: Benjamini & Hochberg (1995), procedure (1); Benjamini & Yekutieli (2001), theorem 1.3.
    Example:
        >>> count_rejected(torch.tensor([[0.01, 0.04, 0.90]]), alpha=0.05).tolist()
        [1]
    """
    check_alpha(alpha)
    _check_p_values(p_values)
    sorted_p_E = p_values.to(torch.float64).sort(dim=-1).values
    is_below_E = on_or_below_line(sorted_p_E, alpha, procedure)
    return last_true_rank(is_below_E, ranks(p_values.shape[-1], p_values.device)).squeeze(-1)


def benjamini_hochberg(p_values: Tensor, alpha: float = 0.05, *, dim: int = -1) -> Tensor:
    """Reject hypotheses at false discovery rate alpha by the Benjamini-Hochberg procedure.

    All p-values up to the largest one on or below the line are rejected, ties with it included.

    Args:
        p_values: in [0, 1], floating, of any shape.
        alpha: target false discovery rate, in (0, 1).
        dim: the axis along which hypotheses are tested together.
    Returns:
        Bool tensor of the same shape, True where rejected.
    Raises:
        InputError: alpha is outside (0, 1), a p-value is NaN or outside [0, 1], or there is no such
            axis.
    Source: Benjamini & Hochberg (1995), procedure (1).
    Example:
        >>> benjamini_hochberg(torch.tensor([0.04, 0.01, 0.03, 0.90]), alpha=0.06).tolist()
        [True, True, True, False]
    """
    return _reject(p_values, alpha, "bh", dim)


def benjamini_yekutieli(p_values: Tensor, alpha: float = 0.05, *, dim: int = -1) -> Tensor:
    """Reject hypotheses at false discovery rate alpha under any dependence between them.

    The line is that of Benjamini-Hochberg divided by 1 + 1/2 + ... + 1/E.

    Args:
        p_values: in [0, 1], floating, of any shape.
        alpha: target false discovery rate, in (0, 1).
        dim: the axis along which hypotheses are tested together.
    Returns:
        Bool tensor of the same shape, True where rejected.
    Raises:
        InputError: alpha is outside (0, 1), a p-value is NaN or outside [0, 1], or there is no such
            axis.
    Source: Benjamini & Yekutieli (2001), theorem 1.3.
    Example:
        >>> benjamini_yekutieli(torch.tensor([0.04, 0.005, 0.03, 0.90]), alpha=0.06).tolist()
        [False, True, False, False]
    """
    return _reject(p_values, alpha, "by", dim)


def storey(p_values: Tensor, alpha: float = 0.05, *, dim: int = -1) -> Tensor:
    """Reject at false discovery rate alpha, adapting to the fraction of true null hypotheses.

    Args:
        p_values: in [0, 1], floating, of any shape.
        alpha: target false discovery rate, in (0, 1).
        dim: the axis along which hypotheses are tested together.
    Returns:
        Bool tensor of the same shape, True where rejected.
    Raises:
        InputError: alpha is outside (0, 1), a p-value is NaN or outside [0, 1], or there is no such
            axis.
    Source: Storey, Taylor & Siegmund (2004), with lambda = 1/2.
    Example:
        >>> storey(torch.tensor([0.02, 0.01, 0.03, 0.06]), alpha=0.05).tolist()
        [True, True, True, True]
    """
    return _reject(p_values, alpha, "storey", dim)


def _reject(p_values: Tensor, alpha: float, procedure: Procedure, dim: int) -> Tensor:
    check_alpha(alpha)
    _check_p_values(p_values, dim)
    p_E = p_values.to(torch.float64).movedim(dim, -1)
    sorted_p_E = p_E.sort(dim=-1).values
    is_below_E = on_or_below_line(sorted_p_E, alpha, procedure)
    # -1 if nothing is rejected: no p-value is that small.
    last_rejected = torch.where(is_below_E, sorted_p_E, -1.0).amax(dim=-1, keepdim=True)
    return (p_E <= last_rejected).movedim(-1, dim)


def _check_p_values(p: Tensor, dim: int = -1) -> None:
    if not isinstance(p, Tensor) or not p.is_floating_point():
        kind = p.dtype if isinstance(p, Tensor) else type(p).__name__
        raise InputError(f"p-values must be a floating-point tensor, got {kind}")
    if p.ndim > 0 and not (isinstance(dim, int) and -p.ndim <= dim < p.ndim):
        raise InputError(
            f"dim must be a whole number from {-p.ndim} to {p.ndim - 1} for p-values of shape "
            f"{tuple(p.shape)}, got {dim!r}"
        )
    if p.ndim == 0 or p.shape[dim] == 0:
        raise InputError(
            f"p-values need at least one hypothesis along dim {dim}, got shape {tuple(p.shape)}"
        )
    num_nan = int(p.isnan().sum())
    if num_nan:
        raise InputError(f"p-values must be in [0, 1], got {num_nan} NaN of {p.numel()} values")
    is_outside = (p < 0) | (p > 1)
    if bool(is_outside.any()):
        worst = float(p[is_outside][0])
        raise InputError(
            f"p-values must be in [0, 1], got {worst:g} and "
            f"{int(is_outside.sum()) - 1} more outside"
        )


def number_blocks(sequence_T: Tensor, position_T: Tensor, block_rows: int) -> Tensor:
    """Number the blocks of `block_rows` consecutive rows of each sequence; no host sync.

    Args:
        sequence_T: int64, number of each row's sequence, whose rows are in order; -1 for a row of
            no sequence, which is a block of its own.
        position_T: int64, number of preceding rows of the same sequence.
        block_rows: rows per block, at least 1; a sequence's last block may be shorter.
    Returns:
        int64 (T,): the first row of each row's block.
    Example:
        >>> sequence, position = torch.tensor([-1, 0, 0, 0, 1]), torch.tensor([0, 0, 1, 2, 0])
        >>> number_blocks(sequence, position, block_rows=2).tolist()
        [0, 1, 1, 3, 4]
    """
    row_T = torch.arange(len(sequence_T), device=sequence_T.device)
    is_member_T = sequence_T >= 0
    is_first_T = is_member_T & (position_T % block_rows == 0)
    return torch.where(is_member_T, torch.where(is_first_T, row_T, 0).cummax(0).values, row_T)


def reject_in_blocks(p_TK: Tensor, alpha: float, block_T: Tensor) -> Tensor:
    """Reject by BH within each block of rows.

    No validation and no host sync.

    Args:
        p_TK: float64 p-values.
        alpha: target false discovery rate, in (0, 1).
        block_T: int64, number of each row's block, 0 to T - 1.
    Returns:
        Bool tensor (T, K), True where rejected.
    Example:
        >>> p = torch.tensor([[0.01, 0.08], [0.02, 0.03], [0.06, 0.90]], dtype=torch.float64)
        >>> reject_in_blocks(p, alpha=0.1, block_T=torch.tensor([0, 0, 2])).tolist()
        [[True, True], [True, True], [False, False]]
    """
    p_M, block_M = p_TK.flatten(), block_T[:, None].expand_as(p_TK).flatten()
    by_p_M = p_M.argsort()
    order_M = by_p_M[block_M[by_p_M].argsort(stable=True)]
    sorted_p_M, sorted_block_M = p_M[order_M], block_M[order_M]
    sizes_T = torch.zeros_like(block_T).scatter_add_(0, block_M, torch.ones_like(block_M))
    starts_T = sizes_T.cumsum(0) - sizes_T
    rank_M = torch.arange(1, len(p_M) + 1, device=p_M.device) - starts_T[sorted_block_M]
    # Size over rank first, as in `on_or_below_line`.
    is_below_M = sorted_p_M * (sizes_T[sorted_block_M].double() / rank_M) <= alpha
    last_T = p_M.new_full(block_T.shape, -1.0).scatter_reduce(
        0, sorted_block_M, torch.where(is_below_M, sorted_p_M, -1.0), "amax"
    )
    return p_TK <= last_T[block_T][:, None]


# Keeps the denominator above 0 if a p-value is 0 or 1; far below any p-value of a table.
_SMALLEST_VARIANCE: Final = 1e-300


def higher_criticism(sorted_p_E: Tensor) -> Tensor:
    """Return sqrt(E) (i/E - p_(i)) / sqrt(p_(i) (1 - p_(i))) for each rank i.

    Args:
        sorted_p_E: p-values in [0, 1], ascending, shape (..., E).
    Returns:
        float64 tensor of the same shape, decreasing in the p-value at a fixed rank.
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
    """Return, for each rank, whether its higher criticism is at least `threshold`."""
    return higher_criticism(sorted_p_E) >= threshold
