"""Rules that decide which experts a decode step reads, for all of its tokens together.

A step reads the union of its tokens' experts, so dropping an expert saves a read only if no token
of the step keeps it. Each token keeps the slots of its own top-k that the step reads, among them
always its best; places of the others can be refilled with the next best experts that the step reads
anyway. In prefill, which has no decode steps, a token keeps all slots of its own top-k; padding
keeps its best slot and never votes. A token's result depends on the other tokens of its step, but
not on their order.

Axes: S steps, T tokens, E experts, K slots. On a GPU as many steps as tokens are provided for:
reading their number would be a host sync.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.nulls.contributions import STEP_SIZES
from bh_routing.rules.base import (
    WHOLE,
    Knob,
    LayerContext,
    MixingRule,
    Scale,
    Unit,
    check_at_most_experts,
    check_choice,
    check_count,
)
from bh_routing.rules.contribution import ContributionRule, ContributionThreshold, layer_scale
from bh_routing.rules.plan import Candidates, Plan, Selector, keep_best, rank_slots, slot_scores

_UNITS: Final = 2.0**40
_SMALLEST: Final = 1e-300

BudgetBy = Literal["gate_mass", "fisher_mass"]


@dataclass(frozen=True, kw_only=True)
class StepRule(MixingRule):
    """Base of rules on decode steps."""

    refill: int | None = None
    """Number of a token's best experts whose reads refill the places of its dropped slots, at least
    the model's own k. None: that k, so that nothing is refilled."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        if self.refill is not None:
            check_count("refill", self.refill)
        super().__post_init__()

    @property
    def unit(self) -> Unit:
        """The decode step."""
        return "step"

    @property
    def keeps_best_by_logit(self) -> bool:
        """False: another token may have read the expert of a slot with a smaller logit."""
        return False

    def plan(self, context: LayerContext) -> Plan | None:
        """Return None: a plan decides each token alone."""
        return None

    def num_candidates(self, model_top_k: int) -> int:
        """Return `refill`, or the model's own k."""
        return max(model_top_k, self.refill or 0)

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if `refill` isn't from the model's own k to all experts."""
        if self.refill is not None:
            check_at_most_experts("refill", self.refill, num_experts)
            if self.refill < model_top_k:
                raise InputError(
                    f"refill must be at least {model_top_k}, the model's own experts per token, "
                    f"got {self.refill}; leave it out, or set a larger one"
                )
        super().check(num_experts=num_experts, model_top_k=model_top_k)


class StepExperts(NamedTuple):
    """The experts of each decode step in one layer."""

    norms_SE: Tensor
    """float32: (sum of score ** exponent over the step's tokens) ** (1 / exponent)."""
    is_present_SE: Tensor
    """Bool: whether a token of the step has the expert in its top-k."""


def step_experts(
    scores_TK: Tensor,
    index_TK: Tensor,
    step_TK: Tensor,
    *,
    num_experts: int,
    num_steps: int,
    exponent: float = 2.0,
) -> StepExperts:
    """Return the norm over a step's tokens of each expert's scores; no host sync.

    Scores are summed as whole multiples of 2 ** -40 of the largest one, so the result doesn't
    depend on the tokens' order, and the norm of a single score is that score.

    Args:
        scores_TK: score of each slot, at least 0.
        index_TK: int64 expert of each slot.
        step_TK: int64 step of each slot, from 0 to num_steps - 1, or -1 for none; may be (T, 1).
        num_experts: E.
        num_steps: S.
        exponent: above 0; 2 for Fisher mass, 1 for a sum.
    """
    size = (num_steps + 1) * num_experts  # the last row is for slots in no step
    row_TK = torch.where(step_TK < 0, num_steps, step_TK)
    pair_M = (row_TK * num_experts + index_TK).flatten()
    score_M = scores_TK.double().flatten()
    largest_P = score_M.new_zeros(size).scatter_reduce(0, pair_M, score_M, "amax")
    ratio_M = score_M / largest_P[pair_M].clamp_min(_SMALLEST)
    units_M = (ratio_M.pow(exponent) * _UNITS).round().long()
    sums_P = torch.zeros_like(largest_P, dtype=torch.int64).scatter_add(0, pair_M, units_M)
    norms_P = largest_P * (sums_P.double() / _UNITS).pow(1 / exponent)
    is_present_P = torch.zeros_like(norms_P, dtype=torch.bool).scatter(
        0, pair_M, torch.ones_like(pair_M, dtype=torch.bool)
    )
    shape = (num_steps + 1, num_experts)
    return StepExperts(
        norms_P.float().view(shape)[:num_steps], is_present_P.view(shape)[:num_steps]
    )


def read_slots(index_TK: Tensor, step_T: Tensor, is_read_SE: Tensor, is_floor_TK: Tensor) -> Tensor:
    """Return which slots have an expert that their token's step reads; no host sync.

    Args:
        index_TK: int64 expert of each slot.
        step_T: int64 step of each token, -1 for none.
        is_read_SE: bool, whether a step reads an expert.
        is_floor_TK: bool, slots whose experts are read in addition.
    Returns:
        Bool tensor (T, K), undefined for tokens in no step.
    """
    num_steps, num_experts = is_read_SE.shape
    row_T1 = torch.where(step_T < 0, num_steps, step_T)[:, None]  # the last one is for no step
    pair_TK = row_T1 * num_experts + index_TK
    is_read_P = torch.nn.functional.pad(is_read_SE.flatten(), (0, num_experts))
    floor_M = torch.where(is_floor_TK, pair_TK, num_steps * num_experts).flatten()
    return is_read_P.scatter(0, floor_M, True)[pair_TK]


def step_selector(
    context: LayerContext,
    scale_E: Tensor,
    min_k: int,
    reads: Callable[[StepExperts, Tensor], Tensor],
    exponent: float = 2.0,
) -> Selector:
    """Return a selector of the slots whose expert the step reads, and of a token's min_k best.

    Args:
        context: the layer.
        scale_E: scale of each expert; a slot's score is its weight times the scale.
        min_k: own slots with the largest scores that a token always keeps.
        reads: experts and tokens of each step -> whether it reads an expert, bool (S, E).
        exponent: that of `step_experts`.
    """
    model_top_k = context.model_top_k

    def select(candidates: Candidates) -> Tensor:
        index_TK, is_own_TK = candidates.top_k_index_TK, keep_best(candidates, model_top_k)
        scores_TK = slot_scores(candidates, scale_E).masked_fill(~is_own_TK, -1.0)
        assert candidates.rows is not None, "the unit isn't the token"
        step_T, is_prefill_T = candidates.rows.step_T, candidates.rows.sequence_T >= 0
        num_steps = len(step_T)
        if step_T.device.type == "cpu" and num_steps and not torch.compiler.is_compiling():
            num_steps = int(step_T.max()) + 1
        # Slots beyond the token's own top-k are refilled, but don't vote.
        step_TK = torch.where(is_own_TK, step_T[:, None], -1)
        experts = step_experts(
            scores_TK.clamp_min(0), index_TK, step_TK,
            num_experts=len(scale_E), num_steps=num_steps, exponent=exponent,
        )  # fmt: skip
        is_floor_TK = rank_slots(candidates, scores_TK) < min_k
        is_read_SE = reads(experts, count_tokens(step_T, num_steps)) & experts.is_present_SE
        is_read_TK = read_slots(index_TK, step_T, is_read_SE, is_floor_TK)
        if index_TK.shape[-1] > model_top_k:
            is_best_TK = rank_slots(candidates, is_read_TK.float()) < model_top_k
            is_read_TK = is_read_TK & is_best_TK
        in_prefill_TK = is_own_TK & is_prefill_T[:, None]
        return torch.where((step_T >= 0)[:, None], is_read_TK, in_prefill_TK) | is_floor_TK

    return select


def count_tokens(step_T: Tensor, num_steps: int) -> Tensor:
    """Return the number of tokens in each step, int64 (S,)."""
    row_T = torch.where(step_T < 0, num_steps, step_T)
    counts = torch.zeros(num_steps + 1, dtype=torch.int64, device=step_T.device)
    return counts.scatter_add(0, row_T, torch.ones_like(row_T))[:num_steps]


class Between(NamedTuple):
    """For each number of tokens up to 64, its place among the calibrated step sizes 1, 2, ... 64.

    Between sizes, values are interpolated linearly in log2 of the number of tokens; larger steps
    use the values of 64.
    """

    lower_B: Tensor
    """int64: the next smaller size's number, 0 for one token."""
    weight_B: Tensor
    """float64: weight of the next larger size, in [0, 1]."""

    @classmethod
    def on(cls, device: torch.device) -> Between:
        """Compute the places on a device."""
        last = len(STEP_SIZES) - 1
        places = [math.log2(max(count, 1)) for count in range(STEP_SIZES[-1] + 1)]
        lower = [min(int(place), last) for place in places]
        weights = [place - low for place, low in zip(places, lower, strict=True)]
        return cls(
            torch.tensor(lower, device=device),
            torch.tensor(weights, dtype=torch.float64, device=device),
        )

    @classmethod
    def values(cls, sizes_7: list[float]) -> Tensor:
        """Interpolate one value per size to every number of tokens, on the CPU; -inf spreads."""
        lower_B, weight_B = cls.on(torch.device("cpu"))
        lower = torch.tensor(sizes_7, dtype=torch.float64)[lower_B]
        upper = torch.tensor(sizes_7[1:], dtype=torch.float64)[lower_B]
        mixed_B = lower * (1 - weight_B) + upper * weight_B
        mixed_B = torch.where(weight_B == 0, lower, mixed_B)
        return torch.where(weight_B == 1, upper, mixed_B)


def reject_in_steps(p_SE: Tensor, is_present_SE: Tensor, alpha: float) -> Tensor:
    """Reject by BH among the experts present in each step; no validation, no host sync."""
    p_SE = torch.where(is_present_SE, p_SE, torch.inf)
    sorted_p_SE = p_SE.sort(dim=-1).values
    rank_E = torch.arange(1, p_SE.shape[-1] + 1, device=p_SE.device)
    # Size over rank first, as in `on_or_below_line`.
    sizes_S1 = is_present_SE.sum(dim=-1, keepdim=True)
    is_below_SE = sorted_p_SE * (sizes_S1.double() / rank_E) <= alpha
    last_S1 = torch.where(is_below_SE, sorted_p_SE, -1.0).amax(dim=-1, keepdim=True)
    return p_SE <= last_S1


@dataclass(frozen=True)
class FisherMass(StepRule, ContributionThreshold):
    """Read the experts whose mass in the step is above one threshold for all layers.

    The mass is the sum of (weight x sensitivity) ** exponent over the step's tokens with the expert
    in their top-k. With exponent 2 it is twice the diagonal-Fisher estimate of the loss that
    leaving the expert out costs. The threshold is for mass ** (1 / exponent), which has the
    statistic's unit: a step of one token is decided as by ContributionThreshold.

    Source: Theis et al. (2018), "Faster gaze prediction with dense networks and Fisher pruning",
        for the estimate, there of a network's parameters.
    Example:
        >>> FisherMass(0.05).unit
        'step'
    """

    method: ClassVar[str] = "fisher_mass"

    exponent: float = 2.0
    """From 1 to 3; other exponents than 2 are ablations."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        is_number = isinstance(self.exponent, (int, float)) and not isinstance(self.exponent, bool)
        if not is_number or not 1.0 <= self.exponent <= 3.0:
            raise InputError(f"exponent must be a number from 1 to 3, got {self.exponent!r}")
        super().__post_init__()

    def bind(self, context: LayerContext) -> Selector:
        """Return a selector with the layer's scale.

        Raises:
            CalibrationError: the context has no contributions.
        """
        scale_E = layer_scale(self.method, self.statistic, context)
        threshold = self.threshold
        return step_selector(
            context,
            scale_E,
            self.min_k,
            lambda experts, _: experts.norms_SE > threshold,
            float(self.exponent),
        )


@dataclass(frozen=True)
class OpportunisticActivation(StepRule):
    """Read each token's k0 best experts, and fill its other places with experts that are read.

    Source: Oncescu et al. (2025), "Opportunistic Expert Activation", arXiv 2511.02237 (read:
        abstract and summaries of the algorithm), there refilled from all experts.
    Example:
        >>> OpportunisticActivation(k0=4, refill=64).num_candidates(model_top_k=8)
        64
    """

    method: ClassVar[str] = "oea"
    knob: ClassVar[Knob | None] = Knob("k0", WHOLE, keeps_more=True)

    k0: int
    """Slots per token whose experts are read, at least 1 and at most the model's own k."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_count("k0", self.k0)
        super().__post_init__()

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if k0 exceeds the model's own k."""
        super().check(num_experts=num_experts, model_top_k=model_top_k)
        if self.k0 > model_top_k:
            raise InputError(
                f"k0 must be at most {model_top_k}, the model's own experts per token, got "
                f"{self.k0}; set k0={model_top_k} or less"
            )

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector, which doesn't depend on the layer's calibration."""
        weight_E = torch.ones(context.num_experts, device=context.device)
        return step_selector(
            context, weight_E, self.k0, lambda experts, _: torch.zeros_like(experts.is_present_SE)
        )


@dataclass(frozen=True)
class ExpertBudget(StepRule, ContributionRule):
    """Read the `budget` experts with the largest mass in the step, and every token's best.

    Source: Vankov et al. (2026), "XShare", arXiv 2602.07265 (read: abstract), for the budget by
        gate mass, the sum of routing weights.
    Example:
        >>> ExpertBudget(40).required_null is None
        True
    """

    method: ClassVar[str] = "expert_budget"
    knob: ClassVar[Knob | None] = Knob(
        "budget", Scale(lambda x: round(math.exp(x)), low=0.0, high=6.5), keeps_more=True
    )

    budget: int
    """Experts per step and layer, from 1 to all; a step whose tokens' best slots have more experts
    reads more."""
    by: BudgetBy = "gate_mass"
    """gate_mass: sum of weights. fisher_mass: sum of (weight x statistic's scale) ** 2."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_count("budget", self.budget)
        check_choice("by", self.by, get_args(BudgetBy))
        super().__post_init__()

    @property
    def required_null(self) -> str | None:
        """Name of the null that must be calibrated; None by gate mass."""
        return None if self.by == "gate_mass" else super().required_null

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if the budget exceeds the experts, or min_k the model's own k."""
        check_at_most_experts("budget", self.budget, num_experts)
        super().check(num_experts=num_experts, model_top_k=model_top_k)

    def bind(self, context: LayerContext) -> Selector:
        """Return a selector, with the layer's scale if the mass needs it.

        Raises:
            CalibrationError: the mass is Fisher's and the context has no contributions.
        """
        if self.by == "gate_mass":
            scale_E, exponent = torch.ones(context.num_experts, device=context.device), 1.0
        else:
            scale_E, exponent = layer_scale(self.method, self.statistic, context), 2.0
        budget = self.budget

        def reads(experts: StepExperts, _: Tensor) -> Tensor:
            # Ties go to the smaller expert index.
            order_SE = experts.norms_SE.argsort(dim=-1, descending=True, stable=True)
            return torch.zeros_like(experts.is_present_SE).scatter(
                -1, order_SE[:, :budget], torch.ones_like(experts.is_present_SE)
            )

        return step_selector(context, scale_E, self.min_k, reads, exponent)
