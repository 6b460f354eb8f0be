"""The three fields that every rule has, and what most rules need besides them."""

from __future__ import annotations

from dataclasses import dataclass

from bh_routing.rules.base import Rule, TemperatureWeights, WeightConvention
from bh_routing.rules.fields import check_mixture


@dataclass(frozen=True, kw_only=True)
class MixingRule(Rule):
    """A rule that chooses among the model's own slots and leaves the mixture to the family."""

    temperature: float = 1.0
    """Divides the router logits; changes the mixture, not the selection."""
    weights: WeightConvention = "model"
    """What the kept slots' weights are."""
    temperature_weights: TemperatureWeights = "mass"
    """What another temperature does to the sum of the kept slots' weights."""

    def __post_init__(self) -> None:
        """Refuse a mixture out of range; a subclass checks its own fields and calls this."""
        check_mixture(self.weights, self.temperature, self.temperature_weights)

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Accept any model: no more slots than its own are asked for."""
