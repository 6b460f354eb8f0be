"""The control with hindsight: a threshold on what each slot truly contributes.

Axes: T tokens, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bh_routing.nulls.contributions import NEEDED
from bh_routing.rules.base import Candidates, LayerContext, Selector
from bh_routing.rules.contribution import DroppingRule, rank_slots, require_contributions
from bh_routing.rules.contribution_threshold import check_contribution_threshold
from bh_routing.rules.knobs import LOG, Knob


@dataclass(frozen=True)
class OracleContribution(DroppingRule):
    """Keep the slots whose true contribution is above `threshold`, and the token's min_k best.

    The true contribution is weight x the norm of the expert's own output for this token, over the
    layer's mean residual norm. Every candidate expert is run to know it: this shows how much a
    better estimate could gain and saves nothing.

    Example:
        >>> OracleContribution(0.05).needs_output_norms
        True
    """

    method: ClassVar[str] = "oracle_contribution"
    knob: ClassVar[Knob | None] = Knob("threshold", LOG, keeps_more=False)

    threshold: float
    """At least 0, a share of the residual's norm; a larger one keeps fewer experts."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_contribution_threshold(self.threshold)
        super().__post_init__()

    @property
    def required_null(self) -> str | None:
        """What calibration must have observed: norms."""
        return NEEDED["norm"]

    @property
    def needs_output_norms(self) -> bool:
        """Yes: the norm of every candidate's output."""
        return True

    def bind(self, context: LayerContext) -> Selector:
        """Look up the layer's mean residual norm.

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
