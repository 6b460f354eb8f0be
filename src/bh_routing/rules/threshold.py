"""Relative-weight threshold: slots that hold a share of the mass. Axes: T tokens, K slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bh_routing.rules.base import Candidates, LayerContext, Selector
from bh_routing.rules.fields import check_share
from bh_routing.rules.knobs import LOG_ODDS, Knob
from bh_routing.rules.mixing import MixingRule


@dataclass(frozen=True)
class Threshold(MixingRule):
    """Keep the slots whose share of the candidates' mass is at least `threshold`, and the best.

    The share, not the raw weight: families that don't renormalise give weights on any scale.

    Example:
        >>> Threshold(0.1).num_candidates(model_top_k=8)
        8
    """

    method: ClassVar[str] = "threshold"
    knob: ClassVar[Knob | None] = Knob("threshold", LOG_ODDS, keeps_more=False)

    threshold: float
    """Share of the candidates' mass, in (0, 1]; a larger one keeps fewer experts."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_share("threshold", self.threshold)
        super().__post_init__()

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector; nothing depends on the layer."""
        threshold = self.threshold

        def select(candidates: Candidates) -> Tensor:
            weights_TK = candidates.top_k_weights_TK.double()
            is_large_TK = weights_TK >= threshold * weights_TK.sum(dim=-1, keepdim=True)
            return is_large_TK | (weights_TK == weights_TK.amax(dim=-1, keepdim=True))

        return select
