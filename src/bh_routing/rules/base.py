"""Base classes of rules: a rule decides which of the router's candidate slots stay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, get_args

import torch
from torch import Tensor

from bh_routing.errors import InputError, unknown_name
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.catalog import check_temperature
from bh_routing.nulls.contributions import Contributions
from bh_routing.rules.plan import Candidates, Plan, Selector, interpret


def check_count(name: str, value: int) -> None:
    """Raise InputError unless the value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """Raise InputError unless the value is a number in (0, 1]."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0.0 < value <= 1.0:
        raise InputError(f"{name} must be a number in (0, 1], got {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise InputError unless the value is one of the choices."""
    if value not in choices:
        raise unknown_name(name, str(value), choices)


def check_mixture(weights: str, temperature: float, temperature_weights: str) -> None:
    """Raise InputError if a field that every rule has is invalid."""
    check_choice("weights", weights, get_args(WeightConvention))
    check_temperature(temperature)
    check_choice("temperature_weights", temperature_weights, get_args(TemperatureWeights))


def check_at_most_experts(name: str, value: int, num_experts: int) -> None:
    """Raise InputError if the value exceeds the number of experts."""
    if value > num_experts:
        raise InputError(
            f"{name} must be at most the {num_experts} experts of a layer, got {value}; set "
            f"{name}={num_experts} or less"
        )


def check_min_k(min_k: int, most_kept: int) -> None:
    """Raise InputError if min_k exceeds the most experts per token that the rule keeps."""
    if min_k > most_kept:
        raise InputError(
            f"min_k must be at most {most_kept}, the most experts per token that the rule keeps in "
            f"this model, got {min_k}; set min_k={most_kept} or less"
        )


_REACH: Final = 16.0


@dataclass(frozen=True, slots=True)
class Scale:
    """A search scale for a tuning parameter: equal steps have about equally large effects."""

    value_at: Callable[[float], float]
    """Position on the scale -> value of the tuning parameter."""
    low: float = -_REACH
    """Lower end of the scale."""
    high: float | None = _REACH
    """Upper end of the scale; None: the model's own k."""

    def ends(self, model_top_k: int) -> tuple[float, float]:
        """Return both ends of the scale."""
        return self.low, float(model_top_k) if self.high is None else self.high


def _logistic(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))


LOG: Final = Scale(math.exp)
"""Numbers above 0."""
LOG_ODDS: Final = Scale(_logistic)
"""Numbers between 0 and 1."""
SIGNED_LOG: Final = Scale(math.sinh)
"""Any number: approximately linear near 0, logarithmic far from 0."""
WHOLE: Final = Scale(round, low=1.0, high=None)
"""Whole numbers of experts."""
EXPERTS: Final = Scale(float, low=1.0, high=None)
"""A mean number of experts."""


@dataclass(frozen=True, slots=True)
class Knob:
    """The tuning parameter of a rule, its search scale and its direction.

    Example:
        >>> Knob("alpha", LOG_ODDS, keeps_more=True).fields(0.05, num_layers=6)
        {'alpha': 0.05}
    """

    name: str
    """The rule's field, or "mean_experts" if the fields are computed from a mean."""
    scale: Scale
    keeps_more: bool
    """Whether a larger value keeps more experts."""
    fields_from: Callable[[float, int], Mapping[str, Any]] | None = None
    """Value and number of layers with a router -> fields; None: the field of the same name."""

    def fields(self, value: float, num_layers: int) -> dict[str, Any]:
        """Return the rule's fields for a value of the tuning parameter."""
        if self.fields_from is None:
            return {self.name: value}
        return dict(self.fields_from(value, num_layers))

    def sets(self, field: str) -> bool:
        """Return whether the tuning parameter sets a field of the rule."""
        return field in self.fields(1.0, num_layers=1)


WeightConvention = Literal["model", "renormalize", "preserve_mass"]
TemperatureWeights = Literal["mass", "raw"]
Unit = Literal["token", "block", "step"]
"""The rows that a rule decides jointly: single tokens, blocks of a sequence's tokens, or the tokens
of all sequences in a decode step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerContext:
    """Properties of one layer that a rule can use before the first token."""

    layer: int
    num_experts: int
    model_top_k: int
    """The model's own number of experts per token."""
    device: torch.device
    table: ReferenceTable | None = None
    """The reference table of the rule's null in this layer, on `device`; None if not needed."""
    contributions: Contributions | None = None
    """Calibrated contributions of all layers, on the CPU; None if the rule doesn't need them."""
    num_layers: int | None = None
    """The model's layers with a router; None if only one layer is known."""


class Rule(ABC):
    """Base of all rules. Subclasses are frozen dataclasses and validate in __post_init__."""

    method: ClassVar[str]
    """The rule's name in the catalog."""
    knob: ClassVar[Knob | None] = None
    """The tuning parameter of a search for a mean number of experts; None: no such search."""
    weights: WeightConvention
    """Convention for the kept slots' weights; see `router.Weighing`."""
    temperature: float
    """Divides the router logits; 1.0 leaves them unchanged."""
    temperature_weights: TemperatureWeights
    """For other temperatures: "mass" preserves the kept slots' sum, "raw" is the ablation."""

    @property
    def required_null(self) -> str | None:
        """Name of the null whose table the rule needs; None if it needs none."""
        return None

    @property
    def keeps_best_by_logit(self) -> bool:
        """Whether the slots that a token keeps always have its largest logits."""
        return True

    @property
    def unit(self) -> Unit:
        """The rows decided jointly; a rule whose unit isn't the token gets its `Rows`."""
        return "token"

    @property
    def needs_output_norms(self) -> bool:
        """Whether the rule needs the output of every candidate expert."""
        return False

    def smallest_alpha(self, num_experts: int) -> float | None:
        """Return the level that `required_null`'s table must resolve for one expert, if any."""
        return None

    def most_kept(self, model_top_k: int) -> int:
        """Return the most experts per token; a value above the model's own k widens its router."""
        return model_top_k

    def num_candidates(self, model_top_k: int) -> int:
        """Return the slots per token that the router must propose, at least the model's own k."""
        return max(model_top_k, self.most_kept(model_top_k))

    @abstractmethod
    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if the rule can't run on a model of this shape."""

    def plan(self, context: LayerContext) -> Plan | None:
        """Return the decision of one layer as data; None if no plan describes it.

        A rule without a plan overrides `bind`.
        """
        return None

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector of one layer, with all token-independent work done."""
        plan = self.plan(context)
        assert plan is not None, f"{type(self).__name__} has neither a plan nor a `bind`"
        return interpret(plan)

    def slot_p_values(self, context: LayerContext) -> Callable[[Candidates], Tensor] | None:
        """Return candidates -> p-value of each slot, float64 (T, K), for reports.

        None if the rule has no p-values.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class MixingRule(Rule):
    """Base of rules with a choice of weights for the kept slots; the default is the family's."""

    temperature: float = 1.0
    """Divides the router logits; changes the mixture, not the selection."""
    weights: WeightConvention = "model"
    """Convention for the kept slots' weights."""
    temperature_weights: TemperatureWeights = "mass"
    """Effect of another temperature on the sum of the kept slots' weights."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range; subclasses check theirs and call this."""
        check_mixture(self.weights, self.temperature, self.temperature_weights)

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Accept any model: the rule needs no more slots than the model's own."""
