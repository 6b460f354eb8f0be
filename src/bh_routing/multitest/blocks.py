"""Benjamini-Hochberg over blocks of rows, where several rows are tested together.

Axes: T rows, K hypotheses of a row, M = T * K.
"""

from __future__ import annotations

import torch
from torch import Tensor


def number_blocks(sequence_T: Tensor, position_T: Tensor, block_rows: int) -> Tensor:
    """Number the blocks of `block_rows` consecutive rows of each sequence; no host sync.

    Args:
        sequence_T: int64, number of each row's sequence, whose rows are in order; -1 for a row that
            belongs to none: it is a block of its own.
        position_T: int64, rows of the same sequence before each.
        block_rows: rows of a block, at least 1; a sequence's last block may be shorter.
    Returns:
        int64 (T,): the row that each row's block starts with.
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
