"""Rules that threshold a slot's contribution, estimated or true."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from bh_routing.errors import CalibrationError, InputError
from bh_routing.nulls.contributions import (
    BY_LOSS,
    NEEDED,
    Contributions,
    Definition,
    Statistic,
    remedy,
)
from bh_routing.rules.base import (
    LOG,
    Candidates,
    Knob,
    LayerContext,
    MixingRule,
    Selector,
    check_choice,
    check_count,
    check_min_k,
)


@dataclass(frozen=True, kw_only=True)
class DroppingRule(MixingRule):
    """Base of rules that drop the model's own slots by a score per slot.

    A dropped slot may have a larger router logit than a kept one.
    """

    min_k: int = 1
    """Number of slots with the largest scores that always stay."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_count("min_k", self.min_k)
        super().__post_init__()

    @property
    def keeps_best_by_logit(self) -> bool:
        """False: the score also depends on the expert's scale."""
        return False

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if min_k exceeds the model's own k, the number of candidates."""
        check_min_k(self.min_k, model_top_k)


@dataclass(frozen=True, kw_only=True)
class ContributionRule(DroppingRule):
    """Base of rules that drop slots by routing weight x calibrated scale."""

    statistic: Statistic = "sensitivity"
    """The scale: see `nulls.contributions.Statistic`. Use "contribution" for a model without
    gradients, such as a quantised one."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_choice("statistic", self.statistic, get_args(Statistic))
        super().__post_init__()

    @property
    def required_null(self) -> str | None:
        """Name of the null that must be calibrated."""
        return needed_null(self.statistic, "norm")


def require_contributions(method: str, context: LayerContext) -> Contributions:
    """Return the context's contributions; raise CalibrationError if it has none."""
    if context.contributions is None:
        raise CalibrationError(
            f"rule {method!r} needs a calibration that observed slots and none was given; "
            f"{remedy(NEEDED['loss'])}"
        )
    return context.contributions


def layer_scale(method: str, statistic: Statistic, context: LayerContext) -> Tensor:
    """Return the scale of each expert on the layer's device, shape (E,)."""
    contributions = require_contributions(method, context)
    return contributions.scale(statistic, context.layer).to(context.device)


def slot_scores(candidates: Candidates, scale_E: Tensor) -> Tensor:
    """Return weight x scale of the slot's expert, float32, shape (T, K)."""
    # float32: bfloat16 scores tie, and a tie moves the count.
    return candidates.top_k_weights_TK.float() * scale_E[candidates.top_k_index_TK]


class RankedSlots(NamedTuple):
    """Slots of each token by score, largest first."""

    scores_TK: Tensor
    """Largest first."""
    rank_TK: Tensor
    """int64: the rank of each slot, 0 for the largest, in the order of the slots."""


def rank_slots(candidates: Candidates, scores_TK: Tensor) -> RankedSlots:
    """Rank slots by score; a tie goes to the larger logit, then to the router's order."""
    logits_TK = candidates.router_logits_TE.gather(-1, candidates.top_k_index_TK)
    by_logit_TK = logits_TK.argsort(dim=-1, descending=True, stable=True)
    by_score_TK = scores_TK.gather(-1, by_logit_TK).argsort(dim=-1, descending=True, stable=True)
    order_TK = by_logit_TK.gather(-1, by_score_TK)
    place_K = torch.arange(order_TK.shape[-1], device=order_TK.device)
    rank_TK = torch.zeros_like(order_TK).scatter_(-1, order_TK, place_K.expand_as(order_TK))
    return RankedSlots(scores_TK.gather(-1, order_TK), rank_TK)


def needed_null(statistic: Statistic, definition: Definition) -> str:
    """Return the name of the null to calibrate for a statistic and a definition of needed slots."""
    return NEEDED["loss" if statistic in BY_LOSS else definition]


def check_contribution_threshold(threshold: float) -> None:
    """Raise InputError unless the threshold is a finite number of at least 0."""
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not is_number or not isfinite(threshold) or threshold < 0:
        raise InputError(f"threshold must be a finite number of at least 0, got {threshold!r}")


@dataclass(frozen=True)
class ContributionThreshold(ContributionRule):
    """Keep the slots whose score is above `threshold`, and the token's min_k best.

    With the same statistic this is the same one-parameter family of decisions as
    BenjaminiHochbergDrop(scope="population"), where alpha determines the threshold.

    Example:
        >>> ContributionThreshold(0.05).required_null
        'needed_by_loss'
    """

    method: ClassVar[str] = "contribution_threshold"
    knob: ClassVar[Knob | None] = Knob("threshold", LOG, keeps_more=False)

    threshold: float
    """At least 0, in the unit of the statistic; a larger one keeps fewer experts."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_contribution_threshold(self.threshold)
        super().__post_init__()

    def bind(self, context: LayerContext) -> Selector:
        """Return a selector with the layer's scale.

        Raises:
            CalibrationError: the context has no contributions.
        """
        scale_E = layer_scale(self.method, self.statistic, context)
        threshold, min_k = self.threshold, self.min_k

        def select(candidates: Candidates) -> Tensor:
            scores_TK = slot_scores(candidates, scale_E)
            return (scores_TK > threshold) | (rank_slots(candidates, scores_TK).rank_TK < min_k)

        return select


@dataclass(frozen=True)
class OracleContribution(DroppingRule):
    """Keep the slots whose true contribution is above `threshold`, and the token's min_k best.

    The true contribution is weight x the norm of the expert's output for this token / the layer's
    mean residual norm. It requires running every candidate expert, so it saves nothing; it shows
    the possible gain from a better estimate.

    Example:
        >>> OracleContribution(0.05).needs_output_norms
        True
    """

    method: ClassVar[str] = "oracle_contribution"
    knob: ClassVar[Knob | None] = Knob("threshold", LOG, keeps_more=False)

    threshold: float
    """At least 0, a fraction of the residual norm; a larger one keeps fewer experts."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_contribution_threshold(self.threshold)
        super().__post_init__()

    @property
    def required_null(self) -> str | None:
        """Name of the null that must be calibrated."""
        return NEEDED["norm"]

    @property
    def needs_output_norms(self) -> bool:
        """True: the rule needs the norm of every candidate's output."""
        return True

    def bind(self, context: LayerContext) -> Selector:
        """Return a selector with the layer's mean residual norm.

        Raises:
            CalibrationError: the context has no contributions.
        """
        contributions = require_contributions(self.method, context)
        residual = contributions.residual_norms_L[context.layer].to(context.device)
        threshold, min_k = self.threshold, self.min_k

        def select(candidates: Candidates) -> Tensor:
            norms_TK = candidates.output_norms_TK
            assert norms_TK is not None  # our own bug: route() fills it in
            scores_TK = candidates.top_k_weights_TK.float() * norms_TK / residual
            return (scores_TK > threshold) | (rank_slots(candidates, scores_TK).rank_TK < min_k)

        return select
