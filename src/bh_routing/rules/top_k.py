"""The rule to beat: the same number of experts for every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bh_routing.rules.base import (
    Candidates,
    LayerContext,
    Rule,
    Selector,
    TemperatureWeights,
    WeightConvention,
)
from bh_routing.rules.fields import check_at_most_experts, check_count, check_mixture
from bh_routing.rules.knobs import WHOLE, Knob
from bh_routing.rules.slots import keep_best


@dataclass(frozen=True)
class TopK(Rule):
    """Keep each token's k best experts; k may exceed the model's own.

    Example:
        >>> TopK(8).num_candidates(model_top_k=2)
        8
    """

    method: ClassVar[str] = "top_k"
    knob: ClassVar[Knob | None] = Knob("k", WHOLE, keeps_more=True)

    k: int
    """Experts a token, from 1 to the experts of a layer."""
    temperature: float = 1.0
    """Divides the router logits; changes the mixture, not the selection."""
    weights: WeightConvention = "model"
    """What the kept slots' weights are."""
    temperature_weights: TemperatureWeights = "mass"
    """What another temperature does to the sum of the kept slots' weights."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_count("k", self.k)
        check_mixture(self.weights, self.temperature, self.temperature_weights)

    def most_kept(self, model_top_k: int) -> int:
        """Return k."""
        return self.k

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Refuse more experts than there are."""
        check_at_most_experts("k", self.k, num_experts)

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector; nothing depends on the layer but its device."""
        self.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
        k = self.k
        count_11 = torch.full((1, 1), k, device=context.device)

        def select(candidates: Candidates) -> Tensor:
            if candidates.top_k_index_TK.shape[-1] <= k:
                return torch.ones_like(candidates.top_k_index_TK, dtype=torch.bool)
            return keep_best(candidates, count_11)

        return select
