"""Critical values of step-up procedures, and the calibration data that they require.

They are computed once per layer, so that routing a token only compares scores. With one table per
layer the p-value is a non-increasing function of the score. The k-th smallest p-value of a token
therefore belongs to its k-th largest score, and "on or below the line at rank k" becomes "score at
least c_k". Axes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.multitest import Procedure, check_alpha, on_or_below_line
from bh_routing.multitest.step_up import STOREY_LAMBDA, last_true_rank, on_or_below_storey_line
from bh_routing.nulls.base import Null, ReferenceTable

DRAWS_ON_FIRST_LINE: Final = 20
"""Reference scores that should lie beyond the first critical value, whose p-value is alpha / E.

An expert can be selected only if 1 / (n + 1) <= alpha / E; at that size a single score decides.
With 20, the tail probability of the critical value has a relative sampling error of 1 / sqrt(20),
about 22 %. So a table needs n >= 20 * E / alpha.
"""

BY_EXPERT_ALPHA: Final = 0.05
"""The level that tables by expert are sized for. Each expert needs 20 * E / alpha tokens outside
the top-k, so memory grows with the square of E: 13 MB per layer of 64 experts, 52 MB of 128."""

OBSERVED_TOKENS: Final = 256
"""Tokens whose scores a calibration keeps for charts."""

MIN_TOKENS: Final = 5_000
"""Distinct tokens. The slots of one token share a hidden state and aren't independent draws, so the
number of scores overstates the sample size."""

MIN_DOCUMENTS: Final = 20
"""Documents. Tokens of one document share a topic: a table of fewer documents fits few topics."""


_SIGN_BITS: Final = 0x7FFFFFFF


def cut_offs(
    null: Null,
    alpha: float,
    num_experts: int,
    table: ReferenceTable | None = None,
    procedure: Procedure = "bh",
) -> Tensor:
    """Return each rank's critical value: the smallest score with a p-value on or below the line.

    Args:
        null: the null distribution.
        alpha: target false discovery rate, in (0, 1).
        num_experts: E.
        table: the layer's reference table, for a null that needs one.
        procedure: "bh" or "by"; the lines of "storey" depend on the token: `storey_cut_offs`.
    Returns:
        float32 tensor of shape (E,) on the CPU, non-increasing; infinity where no score has a
        p-value on or below the line.
    Raises:
        InputError: alpha is outside (0, 1).
        CalibrationError: the null needs a table and none was given.
    """
    check_alpha(alpha)
    assert procedure != "storey"  # our own bug: its lines need the token's large p-values
    return cut_offs_where(
        null, num_experts, lambda p_E: on_or_below_line(p_E, alpha, procedure), table
    )


def cut_offs_where(
    null: Null,
    num_experts: int,
    is_rejected: Callable[[Tensor], Tensor],
    table: ReferenceTable | None = None,
) -> Tensor:
    """Find, for each rank, the smallest score for whose p-value `is_rejected` is True.

    A binary search over float32 bit patterns, which are ordered like the numbers, calls the null's
    own p-value function and the procedure's own line at each step. So counts by critical values
    equal counts by p-values exactly, for any null whose p-value never increases with the score.

    Args:
        null: the null distribution.
        num_experts: E.
        is_rejected: float64 p-values by rank, shape (..., E) -> bool of that shape or of one it
            broadcasts to; a smaller p-value must never turn True into False.
        table: the layer's reference table, for a null that needs one.
    Returns:
        float32 tensor on the CPU, of the shape that `is_rejected` returns.
    """
    assert not null.by_expert  # our own bug: no score is a critical value for every expert
    cpu_table = None if table is None else table.to(torch.device("cpu"))
    return smallest_scores(
        lambda scores: null.p_from_score(scores, cpu_table), num_experts, is_rejected
    )


def smallest_scores(
    p_from_score: Callable[[Tensor], Tensor],
    num_hypotheses: int,
    is_rejected: Callable[[Tensor], Tensor],
) -> Tensor:
    """Find, for each rank, the smallest score whose p-value is rejected, by binary search."""
    largest = torch.finfo(torch.float32).max
    edge_E = torch.full((num_hypotheses,), largest)
    shape = is_rejected(p_from_score(edge_E)).shape
    # Invariant: every score up to key `low` fails, every score from key `high` on passes.
    low_E = (_key_of(-edge_E) - 1).expand(shape)
    high_E = (_key_of(edge_E) + 1).expand(shape)
    while bool((high_E - low_E > 1).any()):
        middle_E = (low_E + high_E) >> 1
        passes_E = is_rejected(p_from_score(_score_of(middle_E)))
        high_E = torch.where(passes_E, middle_E, high_E)
        low_E = torch.where(passes_E, low_E, middle_E)
    return _score_of(high_E)


class StoreyCutOffs(NamedTuple):
    """Critical values of Storey's procedure: one row for each number of large p-values."""

    lines_CE: Tensor
    """float32, shape (E + 1, E), on the CPU; row c is for tokens with c large p-values."""
    smallest_not_large: Tensor
    """float32 scalar: a score below it has a p-value above lambda."""

    def to(self, device: torch.device) -> StoreyCutOffs:
        """Return the critical values on `device`."""
        return StoreyCutOffs(self.lines_CE.to(device), self.smallest_not_large.to(device))


def storey_cut_offs(
    null: Null, alpha: float, num_experts: int, table: ReferenceTable | None = None
) -> StoreyCutOffs:
    """Return the critical values of Storey's procedure; arguments and errors as in `cut_offs`."""
    check_alpha(alpha)
    num_large_C1 = torch.arange(num_experts + 1).unsqueeze(-1)
    lines_CE = cut_offs_where(
        null, num_experts, lambda p: on_or_below_storey_line(p, alpha, num_large_C1), table
    )
    edge_1 = cut_offs_where(null, 1, lambda p: p <= STOREY_LAMBDA, table)
    return StoreyCutOffs(lines_CE, edge_1[0])


def count_at_storey_cut_offs(
    descending_scores_TE: Tensor, storey: StoreyCutOffs, rank_E: Tensor
) -> Tensor:
    """Count the experts that Storey's procedure selects, like `count_at_cut_offs`."""
    num_large_T = (descending_scores_TE < storey.smallest_not_large).sum(dim=-1)
    return count_at_cut_offs(descending_scores_TE, storey.lines_CE[num_large_T], rank_E)


def count_at_cut_offs(descending_scores_TE: Tensor, cut_offs_E: Tensor, rank_E: Tensor) -> Tensor:
    """Count the experts that step-up selects: the largest k whose k-th score is at least c_k.

    Args:
        descending_scores_TE: scores of each token, largest first.
        cut_offs_E: from `cut_offs`, on the same device.
        rank_E: 1, 2, ..., E on the same device, created once per layer like the critical values.
    Returns:
        Int64 tensor of shape (T, 1), values 0 to E. No host sync.
    Example:
        >>> scores, lines = torch.tensor([[9.0, 2.0, 2.0]]), torch.tensor([5.0, 3.0, 2.0])
        >>> count_at_cut_offs(scores, lines, torch.tensor([1, 2, 3])).tolist()
        [[3]]
    """
    return last_true_rank(descending_scores_TE >= cut_offs_E, rank_E)


def _key_of(scores: Tensor) -> Tensor:
    """Map float32 scores to int64 keys of the same order."""
    bits = scores.view(torch.int32).to(torch.int64)
    return torch.where(bits >= 0, bits, ~(bits & _SIGN_BITS))


def _score_of(keys: Tensor) -> Tensor:
    """Invert `_key_of`; the key after that of the largest finite score is infinity."""
    bits = torch.where(keys >= 0, keys, ~keys | ~_SIGN_BITS)
    return bits.to(torch.int32).view(torch.float32)
