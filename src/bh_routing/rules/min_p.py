"""Min-p: slots whose weight is a share of the token's largest weight. Axes: T tokens, K slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bh_routing.rules.base import Candidates, LayerContext, Selector
from bh_routing.rules.fields import check_share
from bh_routing.rules.knobs import LOG_ODDS, Knob
from bh_routing.rules.mixing import MixingRule


@dataclass(frozen=True)
class MinP(MixingRule):
    """Keep the slots whose weight is at least `share` of the token's largest.

    Source: Nguyen et al. (2024), "Turning Up the Heat: Min-p Sampling", there for next tokens.
    Example:
        >>> MinP(0.5).num_candidates(model_top_k=8)
        8
    """

    method: ClassVar[str] = "min_p"
    knob: ClassVar[Knob | None] = Knob("share", LOG_ODDS, keeps_more=False)

    share: float
    """Of the token's largest weight, in (0, 1]; a larger one keeps fewer experts."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_share("share", self.share)
        super().__post_init__()

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector; nothing depends on the layer."""
        share = self.share

        def select(candidates: Candidates) -> Tensor:
            weights_TK = candidates.top_k_weights_TK.double()
            return weights_TK >= share * weights_TK.amax(dim=-1, keepdim=True)

        return select
