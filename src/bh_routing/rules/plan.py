"""Candidate slots, and plans: decisions on them as data, executed here in torch.

A plan says which slots of a token stay in one layer. `interpret` executes it on any device, for
slots in any order; `kernels.router_kernel` executes it as part of one kernel, with the same
decisions bit for bit.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bh_routing.multitest.step_up import last_true_rank, ranks
from bh_routing.nulls.base import Null
from bh_routing.nulls.centred import MAD_TO_SIGMA, CentredNull
from bh_routing.nulls.cut_offs import StoreyCutOffs, count_at_cut_offs, count_at_storey_cut_offs


class Rows(NamedTuple):
    """Sequence and position of each of a forward pass's T rows; a sequence's rows are in order.

    In a decode step every sequence has one row, at position 0.
    """

    sequence_T: Tensor
    """int64: number of the row's sequence, in the order of the batch; -1 for padding."""
    position_T: Tensor
    """int64: preceding rows of the same sequence in this forward pass, without padding."""
    step_T: Tensor
    """int64: number of the decode step that the row is part of; -1 for padding and in prefill."""

    @classmethod
    def of_batch(cls, is_real_BS: Tensor, is_start_BS: Tensor) -> Rows:
        """Number the rows of a batch; no host sync.

        Args:
            is_real_BS: bool, False for padding.
            is_start_BS: bool, True where another sequence starts within a row of the batch.
        Example:
            >>> mask = torch.tensor([[False, True, True], [True, True, True]])
            >>> rows = Rows.of_batch(mask, torch.zeros_like(mask))
            >>> rows.sequence_T.tolist(), rows.position_T.tolist()
            ([-1, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 2])
        """
        is_first_BS = is_real_BS.cumsum(dim=-1) == 1
        is_start_T = (is_real_BS & (is_first_BS | is_start_BS)).flatten()
        is_real_T = is_real_BS.flatten()
        number_T = is_real_T.cumsum(dim=0) - 1
        first_T = torch.where(is_start_T, number_T, 0).cummax(dim=0).values
        return cls(
            torch.where(is_real_T, is_start_T.cumsum(dim=0) - 1, -1),
            torch.where(is_real_T, number_T - first_T, 0),
            # In a call of one position per sequence these are the sequences' next tokens.
            torch.where(is_real_T & (is_real_BS.shape[1] == 1), 0, -1),
        )

    @classmethod
    def of_step(cls, num_rows: int, device: torch.device) -> Rows:
        """Number the rows of a decode step: one row per sequence."""
        numbers_T = torch.arange(num_rows, device=device)
        return cls(numbers_T, torch.zeros_like(numbers_T), torch.zeros_like(numbers_T))

    def as_emulated_steps(self, decode_batch: int, num_positions: int) -> Rows:
        """Return the rows with position t of each `decode_batch` sequences as a decode step."""
        first_T = self.sequence_T // decode_batch * num_positions
        step_T = torch.where(self.sequence_T >= 0, first_T + self.position_T, -1)
        return self._replace(step_T=step_T)

    def to(self, device: torch.device) -> Rows:
        """Return the rows with their tensors on `device`."""
        return Rows(*(field_T.to(device) for field_T in self))


class Candidates(NamedTuple):
    """The slots of T tokens in one layer, as proposed by the model's own router."""

    router_logits_TE: Tensor
    """float32: the scores by which the family ranks experts."""
    top_k_index_TK: Tensor
    """int64, in the family's order, which need not be by weight."""
    top_k_weights_TK: Tensor
    """The family's own weights, in the family's dtype."""
    output_norms_TK: Tensor | None = None
    """float32 norm of each slot's expert output; only for rules with `needs_output_norms`."""
    rows: Rows | None = None
    """The tokens' sequences; only for rules whose `unit` isn't the token."""
    sorted_logits_TE: Tensor | None = None
    """float32: each token's logits, largest first, if its slots are in that order; else None."""


Selector = Callable[[Candidates], Tensor]
"""Candidates -> bool tensor (T, K), True where the slot stays; makes no host sync."""


def rank_slots(candidates: Candidates, scores_TK: Tensor | None = None) -> Tensor:
    """Rank each token's slots by score, or by logit; no host sync.

    Args:
        candidates: the slots of T tokens.
        scores_TK: primary key, with logits as the secondary; None: logits only. Remaining ties go
            to the slot that the router put first.
    Returns:
        int64 rank of each slot, 0 for the largest, shape (T, K).
    Example:
        >>> slots = Candidates(
        ...     router_logits_TE=torch.tensor([[0.1, 3.0, 2.0, 1.0]]),
        ...     top_k_index_TK=torch.tensor([[2, 3, 1]]),
        ...     top_k_weights_TK=torch.tensor([[0.2, 0.1, 0.7]]),
        ... )
        >>> rank_slots(slots).tolist()
        [[1, 2, 0]]
    """
    index_TK = candidates.top_k_index_TK
    place_K = torch.arange(index_TK.shape[-1], device=index_TK.device)
    order_TK = None
    if candidates.sorted_logits_TE is None:
        logits_TK = candidates.router_logits_TE.gather(-1, index_TK)
        order_TK = logits_TK.argsort(dim=-1, descending=True, stable=True)
    if scores_TK is not None:
        by_logit_TK = scores_TK if order_TK is None else scores_TK.gather(-1, order_TK)
        by_score_TK = by_logit_TK.argsort(dim=-1, descending=True, stable=True)
        order_TK = by_score_TK if order_TK is None else order_TK.gather(-1, by_score_TK)
    if order_TK is None:
        return place_K.expand_as(index_TK)
    return torch.zeros_like(order_TK).scatter_(-1, order_TK, place_K.expand_as(order_TK))


def keep_best(candidates: Candidates, count: int) -> Tensor:
    """Keep each token's `count` slots with the largest logits, bool (T, K); no host sync."""
    if candidates.top_k_index_TK.shape[-1] <= count:
        return torch.ones_like(candidates.top_k_index_TK, dtype=torch.bool)
    return rank_slots(candidates) < count


def by_rank(values_TK: Tensor, rank_TK: Tensor) -> Tensor:
    """Reorder the values of slots by rank; `.gather(-1, rank)` restores them."""
    return torch.zeros_like(values_TK).scatter_(-1, rank_TK, values_TK)


def slot_scores(candidates: Candidates, scale_E: Tensor) -> Tensor:
    """Return weight x scale of the slot's expert, float32, shape (T, K)."""
    # float32: bfloat16 scores tie, and a tie moves the count.
    return candidates.top_k_weights_TK.float() * scale_E[candidates.top_k_index_TK]


Decision = Literal["count", "step_up", "drop", "threshold", "top_p", "min_p", "min_fraction"]
"""Kept slots. count: the max_k best. step_up: the best, as many as the last rank whose score
reaches its critical value, limited to [min_k, max_k]. drop: all but those with the smallest
contributions, up to the last rank below its critical value. threshold: contributions above a
threshold. top_p: the best that hold a fraction of the candidates' mass. min_p, min_fraction:
weights of at least a fraction of the largest one, or of the mass. All but count and min_fraction
keep the min_k best by the quantity that they compare; min_fraction keeps the largest weights."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """A rule's decision in one layer as data, on the layer's device; each token alone."""

    decision: Decision
    min_k: int = 1
    max_k: int = 1
    empty_k: int = 0
    """For step_up: replaces a count of 0, before limits apply."""
    null: Null | None = None
    """For step_up: gives the scores."""
    temperature: float = 1.0
    """For step_up: divides the logits; cancels in every null but "softmax"."""
    lines: Tensor | None = None
    """Critical values by rank, float32 (E,) for step_up and (K,) for drop; the threshold, float32
    (1,); the fraction, float64 (1,)."""
    storey: StoreyCutOffs | None = None
    """For step_up: Storey's critical values, which depend on the token; `lines` are all of them."""
    scale_E: Tensor | None = None
    """For drop and threshold, float32: a slot's contribution is its weight times the scale."""


_SIGMA: Final = np.float32(MAD_TO_SIGMA)
_TINY: Final = np.finfo(np.float32).tiny


def interpret(plan: Plan) -> Selector:
    """Return the selector of a plan."""
    if plan.decision == "step_up":
        return _by_step_up(plan)
    if plan.decision == "count":
        return lambda candidates: keep_best(candidates, plan.max_k)
    by = _by_mass if plan.scale_E is None else _by_contribution
    return lambda candidates: by(plan, candidates)


def _by_step_up(plan: Plan) -> Selector:
    null, lines, storey = plan.null, plan.lines, plan.storey
    assert null is not None
    assert lines is not None
    rank_E = ranks(lines.shape[-1], lines.device)
    counts = [plan.empty_k, *range(1, len(rank_E) + 1)]
    counts = [min(max(count, plan.min_k), plan.max_k) for count in counts]
    kept_by_count = torch.tensor(counts, device=lines.device)
    is_kept_by_count = (rank_E <= kept_by_count.unsqueeze(1)).unsqueeze(1).unbind()
    takes_one = lines.device.type == "cpu" and storey is None and isinstance(null, CentredNull)

    def select(candidates: Candidates) -> Tensor:
        sorted_TE = candidates.sorted_logits_TE
        if takes_one and sorted_TE is not None and len(sorted_TE) == 1:
            count = _count_of_one(sorted_TE[0].numpy(), plan)
            if count is not None:
                return is_kept_by_count[count][:, : candidates.top_k_index_TK.shape[-1]]
        scores_TE = null.descending_scores(candidates.router_logits_TE, plan.temperature, sorted_TE)
        if storey is not None:
            counts_T1 = count_at_storey_cut_offs(scores_TE, storey, rank_E)
        else:
            counts_T1 = count_at_cut_offs(scores_TE, lines, rank_E)
        return rank_slots(candidates) < kept_by_count.take(counts_T1)

    return select


def _count_of_one(sorted_E: NDArray[np.float32], plan: Plan) -> int | None:
    """Return a token's last rank on its critical value, None if the MAD is 0; for speed on CPUs."""
    assert plan.lines is not None
    middle = len(sorted_E) // 2
    scores_E = sorted_E - _median(sorted_E, middle)
    if isinstance(plan.null, CentredNull) and plan.null.is_studentized:
        mad = _median(np.sort(np.abs(scores_E)), middle)
        if not mad > 0:
            return None
        scores_E /= max(mad * _SIGMA, _TINY)
    reached = np.flatnonzero(scores_E >= plan.lines.numpy())
    return int(reached[-1]) + 1 if len(reached) else 0


def _median(sorted_E: NDArray[np.float32], middle: int) -> np.float32:
    if len(sorted_E) % 2:
        return np.float32(sorted_E[middle])
    return np.float32((sorted_E[middle - 1] + sorted_E[middle]) / np.float32(2))


def _by_contribution(plan: Plan, candidates: Candidates) -> Tensor:
    assert plan.lines is not None
    assert plan.scale_E is not None
    scores_TK = slot_scores(candidates, plan.scale_E)
    rank_TK = rank_slots(candidates, scores_TK)
    if plan.decision == "threshold":
        return (scores_TK > plan.lines) | (rank_TK < plan.min_k)
    # Step-up over negated scores: the last rank is tested at the first critical value.
    num_slots = scores_TK.shape[-1]
    is_below_TK = -scores_TK >= plan.lines[num_slots - 1 - rank_TK]
    dropped_T1 = last_true_rank(is_below_TK, num_slots - rank_TK)
    return rank_TK < (num_slots - dropped_T1).clamp_min(plan.min_k)


def _by_mass(plan: Plan, candidates: Candidates) -> Tensor:
    fraction = plan.lines
    assert fraction is not None
    # float64: the sum over preceding slots must not depend on the number of later slots.
    weights_TK = candidates.top_k_weights_TK.double()
    if plan.decision == "top_p":
        rank_TK = rank_slots(candidates)
        sorted_TK = by_rank(weights_TK, rank_TK)
        before_TK = (sorted_TK.cumsum(dim=-1) - sorted_TK).gather(-1, rank_TK)
        is_within_TK = before_TK < fraction * sorted_TK.sum(dim=-1, keepdim=True)
        return is_within_TK | (rank_TK < plan.min_k)
    largest_T1 = weights_TK.amax(dim=-1, keepdim=True)
    if plan.decision == "min_fraction":
        is_large_TK = weights_TK >= fraction * weights_TK.sum(dim=-1, keepdim=True)
        return is_large_TK | (weights_TK == largest_T1)
    is_large_TK = weights_TK >= fraction * largest_T1
    if plan.min_k == 1:  # the largest weight itself is large
        return is_large_TK
    return is_large_TK | (rank_slots(candidates, weights_TK) < plan.min_k)
