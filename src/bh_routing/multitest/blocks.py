"""Benjamini-Hochberg over blocks of rows: what is tested together is larger than a row.

Axes: T rows, K hypotheses of a row, B rows of a block, G blocks, M = B * K.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reject_in_blocks(p_TK: Tensor, alpha: float, block_rows: int) -> Tensor:
    """Reject by BH within each block of `block_rows` consecutive rows; the last may be shorter.

    No validation and no host sync.

    Args:
        p_TK: float64 p-values.
        alpha: target false discovery rate, in (0, 1).
        block_rows: rows tested together, at least 1.
    Returns:
        Bool tensor (T, K), True where rejected.
    Example:
        >>> p = torch.tensor([[0.01, 0.08], [0.02, 0.03], [0.06, 0.90]], dtype=torch.float64)
        >>> reject_in_blocks(p, alpha=0.1, block_rows=2).tolist()
        [[True, True], [True, True], [False, False]]
    """
    num_rows, num_columns = p_TK.shape
    num_blocks = -(-num_rows // block_rows)
    missing = num_blocks * block_rows - num_rows
    # An infinite p-value is no hypothesis: it is never rejected and isn't counted.
    padding = p_TK.new_full((missing, num_columns), torch.inf)
    p_GM = torch.cat([p_TK, padding]).view(num_blocks, block_rows * num_columns)
    sorted_p_GM = p_GM.sort(dim=-1).values
    rank_M = torch.arange(1, p_GM.shape[-1] + 1, dtype=torch.float64, device=p_TK.device)
    num_hypotheses_G1 = p_GM.isfinite().sum(dim=-1, keepdim=True)
    is_below_GM = sorted_p_GM * (num_hypotheses_G1 / rank_M) <= alpha
    last_G1 = torch.where(is_below_GM, sorted_p_GM, -1.0).amax(dim=-1, keepdim=True)
    return (p_GM <= last_G1).view(-1, num_columns)[:num_rows]
