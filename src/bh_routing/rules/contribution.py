"""Rules that threshold a slot's contribution, estimated or true."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar, get_args

import torch
from torch import Tensor

from bh_routing.errors import CalibrationError, InputError
from bh_routing.nulls.contributions import Contributions, Statistic, needed_null, remedy
from bh_routing.rules.base import (
    LOG,
    Knob,
    LayerContext,
    MixingRule,
    check_choice,
    check_count,
    check_min_k,
)
from bh_routing.rules.plan import Candidates, Plan, Selector, rank_slots


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
            f"{remedy(needed_null('sensitivity', 'loss'))}"
        )
    return context.contributions


def layer_scale(method: str, statistic: Statistic, context: LayerContext) -> Tensor:
    """Return the scale of each expert on the layer's device, shape (E,)."""
    contributions = require_contributions(method, context)
    return contributions.scale(statistic, context.layer).to(context.device)


def threshold_plan(rule: ContributionRule, threshold: float, context: LayerContext) -> Plan:
    """Return the plan that keeps the contributions above a threshold."""
    return Plan(
        decision="threshold",
        min_k=rule.min_k,
        lines=torch.tensor([threshold], device=context.device),
        scale_E=layer_scale(rule.method, rule.statistic, context),
    )


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

    def plan(self, context: LayerContext) -> Plan | None:
        """Return the plan with the layer's scale.

        Raises:
            CalibrationError: the context has no contributions.
        """
        return threshold_plan(self, self.threshold, context)


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
        return needed_null("contribution", "norm")

    @property
    def needs_output_norms(self) -> bool:
        """True: the rule needs the norm of every candidate's output."""
        return True

    def bind(self, context: LayerContext) -> Selector:
        """Return a selector with the layer's mean residual norm.

        A plan knows nothing of the experts' outputs.

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
            return (scores_TK > threshold) | (rank_slots(candidates, scores_TK) < min_k)

        return select
