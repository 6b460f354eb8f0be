"""Top-p: the fewest slots that hold a share of the router's weight.

Axes: T tokens, K candidate slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bh_routing.rules.base import Candidates, LayerContext, Selector
from bh_routing.rules.fields import check_share
from bh_routing.rules.knobs import LOG_ODDS, Knob
from bh_routing.rules.mixing import MixingRule
from bh_routing.rules.slots import by_slot, sort_slots


@dataclass(frozen=True)
class TopP(MixingRule):
    """Keep the best slots until they hold the share p of the candidates' mass.

    The mass is that of the model's own k slots, not of all experts: p = 1 keeps all of them, and
    no model needs widening.

    Source: Huang et al. (2024), "Harder Tasks Need More Experts", there over all experts.
    Example:
        >>> TopP(0.9).num_candidates(model_top_k=8)
        8
    """

    method: ClassVar[str] = "top_p"
    knob: ClassVar[Knob | None] = Knob("p", LOG_ODDS, keeps_more=True)

    p: float
    """Share of the candidates' mass, in (0, 1]; a larger one keeps more experts."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_share("p", self.p)
        super().__post_init__()

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector; nothing depends on the layer."""
        p = self.p

        def select(candidates: Candidates) -> Tensor:
            order_TK, weights_TK = sort_slots(candidates)
            # float64: the sum of what came before must not depend on how many slots follow.
            before_TK = weights_TK.cumsum(dim=-1) - weights_TK
            keep_TK = before_TK < p * weights_TK.sum(dim=-1, keepdim=True)
            keep_TK[:, 0] = True
            return by_slot(order_TK, keep_TK)

        return select
