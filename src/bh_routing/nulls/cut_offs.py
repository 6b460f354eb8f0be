"""Step-up lines as scores: computed once a layer, so that routing a token only compares.

With one table a layer the p-value is a non-increasing function of the score. The k-th smallest
p-value of a token therefore belongs to its k-th largest score, and "on or below the line at rank
k" becomes "score at least c_k". Axes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from bh_routing.multitest import Procedure, check_alpha, on_or_below_line
from bh_routing.multitest.step_up import last_true_rank
from bh_routing.nulls.base import Null, ReferenceTable

_SIGN_BITS: Final = 0x7FFFFFFF


def cut_offs(
    null: Null,
    alpha: float,
    num_experts: int,
    table: ReferenceTable | None = None,
    procedure: Procedure = "bh",
) -> Tensor:
    """Find, for each rank, the smallest score whose p-value is on or below the line.

    The search halves the range of float32 bit patterns, which are ordered like the numbers they
    stand for, and asks the null's own p-value function and the procedure's own line each time. So
    the count of a token by cut-offs equals its count by p-values bit for bit, for any null whose
    p-value never rises with the score.

    Args:
        null: the null.
        alpha: target false discovery rate, in (0, 1).
        num_experts: E.
        table: the layer's reference, for a null that needs one.
        procedure: "bh" or "by".
    Returns:
        float32 tensor of shape (E,) on the CPU, non-increasing; infinity where no score can be
        on or below the line.
    Raises:
        InputError: alpha is outside (0, 1).
        CalibrationError: the null needs a table and none was given.
    """
    check_alpha(alpha)
    cpu_table = None if table is None else table.to(torch.device("cpu"))
    largest = torch.finfo(torch.float32).max
    # Invariant: every score up to key `low` fails, every score from key `high` on passes.
    low_E = _key_of(torch.full((num_experts,), -largest)) - 1
    high_E = _key_of(torch.full((num_experts,), largest)) + 1
    while bool((high_E - low_E > 1).any()):
        middle_E = (low_E + high_E) >> 1
        p_E = null.p_from_score(_score_of(middle_E), cpu_table)
        passes_E = on_or_below_line(p_E, alpha, procedure)
        high_E = torch.where(passes_E, middle_E, high_E)
        low_E = torch.where(passes_E, low_E, middle_E)
    return _score_of(high_E)


def count_at_cut_offs(descending_scores_TE: Tensor, cut_offs_E: Tensor, rank_E: Tensor) -> Tensor:
    """Count the experts that step-up selects: the largest k whose k-th score is at least c_k.

    Args:
        descending_scores_TE: scores of each token, largest first.
        cut_offs_E: from `cut_offs`, on the same device.
        rank_E: 1, 2, ..., E on the same device, made once a layer like the cut-offs.
    Returns:
        Int64 tensor of shape (T, 1), values 0 to E. No host sync.
    Example:
        >>> scores, lines = torch.tensor([[9.0, 2.0, 2.0]]), torch.tensor([5.0, 3.0, 2.0])
        >>> count_at_cut_offs(scores, lines, torch.tensor([1, 2, 3])).tolist()
        [[3]]
    """
    return last_true_rank(descending_scores_TE >= cut_offs_E, rank_E)


def _key_of(scores: Tensor) -> Tensor:
    """Map float32 to int64 so that integers are ordered like the scores."""
    bits = scores.view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits, ~(bits & _SIGN_BITS))


def _score_of(keys: Tensor) -> Tensor:
    """Undo `_key_of`; one beyond the largest finite score is infinity."""
    bits = torch.where(keys >= 0, keys, ~keys | ~_SIGN_BITS)
    return bits.to(torch.int32).view(torch.float32)
