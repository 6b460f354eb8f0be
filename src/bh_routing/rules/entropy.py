"""Entropy: as many experts as the router's distribution has effective ones.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.rules.base import Candidates, LayerContext, Selector
from bh_routing.rules.knobs import LOG, Knob
from bh_routing.rules.mixing import MixingRule
from bh_routing.rules.slots import keep_best


@dataclass(frozen=True)
class Entropy(MixingRule):
    """Keep k = ceil(scale * exp(H)) experts, at least 1 and at most the model's own k.

    H is the entropy in nats of softmax(router logits) over all experts, so exp(H) is the number
    of equally likely experts that would be as uncertain. A flat router keeps more.

    Source: Hill (1973), "Diversity and Evenness", for exp(H) as an effective number.
    Example:
        >>> Entropy(0.2).num_candidates(model_top_k=8)
        8
    """

    method: ClassVar[str] = "entropy"
    knob: ClassVar[Knob | None] = Knob("scale", LOG, keeps_more=True)

    scale: float
    """Experts for each effective one, above 0; a larger one keeps more experts."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        is_number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not is_number or not isfinite(self.scale) or self.scale <= 0:
            raise InputError(f"scale must be a finite number above 0, got {self.scale!r}")
        super().__post_init__()

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector; nothing depends on the layer."""
        scale = self.scale

        def select(candidates: Candidates) -> Tensor:
            # float64: a rounding error must not lift a token over a whole number.
            log_p_TE = candidates.router_logits_TE.double().log_softmax(dim=-1)
            effective_T1 = (-(log_p_TE.exp() * log_p_TE).sum(dim=-1, keepdim=True)).exp()
            num_slots = candidates.top_k_index_TK.shape[-1]
            return keep_best(candidates, (scale * effective_T1).ceil().clamp(1, num_slots))

        return select
