"""One fixed threshold on the expected contribution, for all tokens and layers.

Axes: T tokens, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.rules.base import Candidates, LayerContext, Selector
from bh_routing.rules.contribution import (
    ContributionRule,
    layer_scale,
    rank_slots,
    slot_scores,
)
from bh_routing.rules.knobs import LOG, Knob


def check_contribution_threshold(threshold: float) -> None:
    """Raise InputError unless this is a finite number of at least 0."""
    is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not is_number or not isfinite(threshold) or threshold < 0:
        raise InputError(f"threshold must be a finite number of at least 0, got {threshold!r}")


@dataclass(frozen=True)
class ContributionThreshold(ContributionRule):
    """Keep the slots whose score is above `threshold`, and the token's min_k best.

    With the same statistic this is the same one-parameter family of decisions as
    BenjaminiHochbergDrop(scope="population"): there alpha picks the threshold.

    Example:
        >>> ContributionThreshold(0.05).required_null
        'needed_by_loss'
    """

    method: ClassVar[str] = "contribution_threshold"
    knob: ClassVar[Knob | None] = Knob("threshold", LOG, keeps_more=False)

    threshold: float
    """At least 0, in the unit of the statistic; a larger one keeps fewer experts."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_contribution_threshold(self.threshold)
        super().__post_init__()

    def bind(self, context: LayerContext) -> Selector:
        """Look up the layer's scale.

        Raises:
            CalibrationError: the context has no contributions.
        """
        scale_E = layer_scale(self.method, self.statistic, context)
        threshold, min_k = self.threshold, self.min_k

        def select(candidates: Candidates) -> Tensor:
            scores_TK = slot_scores(candidates, scale_E)
            return (scores_TK > threshold) | (rank_slots(candidates, scores_TK).rank_TK < min_k)

        return select
