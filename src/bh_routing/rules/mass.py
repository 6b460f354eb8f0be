"""Rules on routing weights: top-p, min-p, thresholds, entropy. Axes: T tokens, K slots."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.rules.base import (
    LOG,
    LOG_ODDS,
    Knob,
    LayerContext,
    MixingRule,
    check_count,
    check_fraction,
    check_min_k,
)
from bh_routing.rules.plan import Candidates, Decision, Plan, Selector, rank_slots


def fraction_plan(
    decision: Decision, fraction: float, context: LayerContext, min_k: int = 1
) -> Plan:
    """Return a plan that compares weights with a fraction of the token's mass or largest weight."""
    lines = torch.tensor([fraction], dtype=torch.float64, device=context.device)
    return Plan(decision=decision, min_k=min_k, lines=lines)


@dataclass(frozen=True)
class TopP(MixingRule):
    """Keep the best slots until they hold the fraction p of the candidates' mass.

    The mass is that of the model's own k slots, not of all experts: p = 1 keeps all k, and the
    router needn't be widened.

    Source: Huang et al. (2024), "Harder Tasks Need More Experts", there over all experts.
    Example:
        >>> TopP(0.9).num_candidates(model_top_k=8)
        8
    """

    method: ClassVar[str] = "top_p"
    knob: ClassVar[Knob | None] = Knob("p", LOG_ODDS, keeps_more=True)

    p: float
    """Fraction of the candidates' mass, in (0, 1]; a larger one keeps more experts."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_fraction("p", self.p)
        super().__post_init__()

    def plan(self, context: LayerContext) -> Plan:
        """Return the plan, which doesn't depend on the layer."""
        return fraction_plan("top_p", self.p, context)


@dataclass(frozen=True)
class MinP(MixingRule):
    """Keep the slots whose weight is at least `share` times the token's largest.

    Source: Nguyen et al. (2024), "Turning Up the Heat: Min-p Sampling", there for next tokens.
    Example:
        >>> MinP(0.5).num_candidates(model_top_k=8)
        8
    """

    method: ClassVar[str] = "min_p"
    knob: ClassVar[Knob | None] = Knob("share", LOG_ODDS, keeps_more=False)

    share: float
    """Fraction of the token's largest weight, in (0, 1]; a larger one keeps fewer experts."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_fraction("share", self.share)
        super().__post_init__()

    def plan(self, context: LayerContext) -> Plan:
        """Return the plan, which doesn't depend on the layer."""
        return fraction_plan("min_p", self.share, context)


@dataclass(frozen=True)
class FloorThreshold(MixingRule):
    """Keep the min_k best slots, and others whose weight is at least `ratio` times the largest.

    Source: Lu et al. (2024), "Not All Experts are Equal", arXiv 2402.14800, for dynamic skipping
        in top-2 routers, with one calibrated ratio per layer; a floor above 1 is this rule's.
    Example:
        >>> FloorThreshold(min_k=2, ratio=[0.5, 0.3]).ratio
        (0.5, 0.3)
    """

    method: ClassVar[str] = "floor_threshold"
    knob: ClassVar[Knob | None] = Knob("ratio", LOG_ODDS, keeps_more=False)

    min_k: int
    """Slots with the largest weights that always stay, at least 1."""
    ratio: float | tuple[float, ...]
    """Fraction of the token's largest weight, in (0, 1], or one for each layer with a router, first
    layer first, which may be given as a list; a larger one keeps fewer experts. `median_ratios`
    finds the source's."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_count("min_k", self.min_k)
        if isinstance(self.ratio, (list, tuple)):
            if not self.ratio:
                raise InputError("ratio must be a number, or a list of one per layer, got none")
            for layer, ratio in enumerate(self.ratio):
                check_fraction(f"ratio of layer {layer}", ratio)
            # A configuration file gives a list, but a rule must be hashable.
            object.__setattr__(self, "ratio", tuple(self.ratio))
        else:
            check_fraction("ratio", self.ratio)
        super().__post_init__()

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if min_k exceeds the model's own k."""
        check_min_k(self.min_k, model_top_k)

    def plan(self, context: LayerContext) -> Plan:
        """Return the plan with the layer's ratio.

        Raises:
            InputError: there is not one ratio per layer.
        """
        ratio = self.ratio
        if isinstance(ratio, tuple):
            expected = context.num_layers or len(ratio)
            if len(ratio) != expected or context.layer >= len(ratio):
                raise InputError(
                    f"ratio must have one number for each of the {expected} layers with a router, "
                    f"got {len(ratio)}; give one number for all layers, or {expected}"
                )
            ratio = ratio[context.layer]
        return fraction_plan("min_p", ratio, context, self.min_k)


@dataclass(frozen=True)
class Threshold(MixingRule):
    """Keep the slots with at least a fraction `threshold` of the candidates' mass, and the best.

    The fraction, not the raw weight: without renormalisation, weights may have any scale.

    Example:
        >>> Threshold(0.1).num_candidates(model_top_k=8)
        8
    """

    method: ClassVar[str] = "threshold"
    knob: ClassVar[Knob | None] = Knob("threshold", LOG_ODDS, keeps_more=False)

    threshold: float
    """Fraction of the candidates' mass, in (0, 1]; a larger one keeps fewer experts."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_fraction("threshold", self.threshold)
        super().__post_init__()

    def plan(self, context: LayerContext) -> Plan:
        """Return the plan, which doesn't depend on the layer."""
        return fraction_plan("min_fraction", self.threshold, context)


@dataclass(frozen=True)
class Entropy(MixingRule):
    """Keep k = ceil(scale * exp(H)) experts, at least 1 and at most the model's own k.

    H is the entropy in nats of softmax(router logits) over all experts, so exp(H) is the number of
    equally likely experts with the same entropy. A flat router keeps more.

    Source: Hill (1973), "Diversity and Evenness", for exp(H) as an effective number.
    Example:
        >>> Entropy(0.2).num_candidates(model_top_k=8)
        8
    """

    method: ClassVar[str] = "entropy"
    knob: ClassVar[Knob | None] = Knob("scale", LOG, keeps_more=True)

    scale: float
    """Kept experts per effective expert, above 0; a larger one keeps more experts."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        is_number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not is_number or not isfinite(self.scale) or self.scale <= 0:
            raise InputError(f"scale must be a finite number above 0, got {self.scale!r}")
        super().__post_init__()

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector, which doesn't depend on the layer.

        A plan compares slots; the entropy is that of all experts.
        """
        scale = self.scale

        def select(candidates: Candidates) -> Tensor:
            # float64: a rounding error must not lift a count above a whole number.
            log_p_TE = candidates.router_logits_TE.double().log_softmax(dim=-1)
            effective_T1 = (-(log_p_TE.exp() * log_p_TE).sum(dim=-1, keepdim=True)).exp()
            num_slots = candidates.top_k_index_TK.shape[-1]
            return rank_slots(candidates) < (scale * effective_T1).ceil().clamp(1, num_slots)

        return select
