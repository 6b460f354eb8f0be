"""What a rule is: it sees the slots that the model's router proposes and says which stay."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bh_routing.errors import InputError, unknown_name
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.catalog import check_temperature
from bh_routing.nulls.contributions import Contributions


def check_count(name: str, value: int) -> None:
    """Raise InputError unless this is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_share(name: str, value: float) -> None:
    """Raise InputError unless this is a number in (0, 1]."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0.0 < value <= 1.0:
        raise InputError(f"{name} must be a number in (0, 1], got {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise InputError unless the value is one of the choices."""
    if value not in choices:
        raise unknown_name(name, str(value), choices)


def check_mixture(weights: str, temperature: float, temperature_weights: str) -> None:
    """Check the fields that every rule has."""
    check_choice("weights", weights, get_args(WeightConvention))
    check_temperature(temperature)
    check_choice("temperature_weights", temperature_weights, get_args(TemperatureWeights))


def check_at_most_experts(name: str, value: int, num_experts: int) -> None:
    """Raise InputError if a rule asks for more experts than there are."""
    if value > num_experts:
        raise InputError(
            f"{name} must be at most the {num_experts} experts of a layer, got {value}; set "
            f"{name}={num_experts} or less"
        )


def check_min_k(min_k: int, most_kept: int) -> None:
    """Raise InputError if a token is to keep more experts than a rule may keep in this model."""
    if min_k > most_kept:
        raise InputError(
            f"min_k must be at most {most_kept}, the most experts per token that the rule keeps in "
            f"this model, got {min_k}; set min_k={most_kept} or less"
        )


_REACH: Final = 16.0


@dataclass(frozen=True, slots=True)
class Scale:
    """A line on which a knob is searched: equal steps on it are about equally large changes."""

    value_at: Callable[[float], float]
    """Place on the line -> value of the knob."""
    low: float = -_REACH
    """Where the line starts."""
    high: float | None = _REACH
    """Where it ends; None: at the model's own k."""

    def ends(self, model_top_k: int) -> tuple[float, float]:
        """Return both ends of the line."""
        return self.low, float(model_top_k) if self.high is None else self.high


def _logistic(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))


LOG: Final = Scale(math.exp)
"""Numbers above 0."""
LOG_ODDS: Final = Scale(_logistic)
"""Numbers between 0 and 1."""
SIGNED_LOG: Final = Scale(math.sinh)
"""Any number: about linear near 0, logarithmic far from it."""
WHOLE: Final = Scale(round, low=1.0, high=None)
"""Whole numbers of experts."""
EXPERTS: Final = Scale(float, low=1.0, high=None)
"""A mean number of experts."""


@dataclass(frozen=True, slots=True)
class Knob:
    """Which number of a rule is turned, and which way.

    Example:
        >>> Knob("alpha", LOG_ODDS, keeps_more=True).fields(0.05, num_layers=6)
        {'alpha': 0.05}
    """

    name: str
    """The rule's field, or "mean_experts" where fields are made from a mean."""
    scale: Scale
    keeps_more: bool
    """Whether a larger value keeps more experts."""
    fields_from: Callable[[float, int], Mapping[str, Any]] | None = None
    """Value and number of layers with a router -> fields; None: the field of the same name."""

    def fields(self, value: float, num_layers: int) -> dict[str, Any]:
        """Return the rule's fields at a value of the knob."""
        if self.fields_from is None:
            return {self.name: value}
        return dict(self.fields_from(value, num_layers))

    def sets(self, field: str) -> bool:
        """Whether a field of the rule is the knob's to set."""
        return field in self.fields(1.0, num_layers=1)


WeightConvention = Literal["model", "renormalize", "preserve_mass"]
TemperatureWeights = Literal["mass", "raw"]
Unit = Literal["token", "block"]
"""The rows that a rule decides together: each token alone, or blocks of a sequence's tokens."""


class Rows(NamedTuple):
    """The sequences that the T rows of a forward pass belong to; a sequence's rows are in order.

    Rows of one position decode together: in a decode step every sequence has one row, position 0.
    """

    sequence_T: Tensor
    """int64: number of the row's sequence, in the order of the batch; -1 at padding."""
    position_T: Tensor
    """int64: rows of the same sequence before this one, in this forward pass, without padding."""

    @classmethod
    def of_batch(cls, is_real_BS: Tensor, is_start_BS: Tensor) -> Rows:
        """Number the rows of a batch; no host sync.

        Args:
            is_real_BS: bool, False at padding.
            is_start_BS: bool, True where another sequence starts within a row of the batch.
        Example:
            >>> mask = torch.tensor([[False, True, True], [True, True, True]])
            >>> rows = Rows.of_batch(mask, torch.zeros_like(mask))
            >>> rows.sequence_T.tolist(), rows.position_T.tolist()
            ([-1, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 2])
        """
        is_first_BS = is_real_BS.cumsum(dim=-1) == 1
        is_start_T = (is_real_BS & (is_first_BS | is_start_BS)).flatten()
        is_real_T = is_real_BS.flatten()
        number_T = is_real_T.cumsum(dim=0) - 1
        first_T = torch.where(is_start_T, number_T, 0).cummax(dim=0).values
        return cls(
            torch.where(is_real_T, is_start_T.cumsum(dim=0) - 1, -1),
            torch.where(is_real_T, number_T - first_T, 0),
        )

    @classmethod
    def of_step(cls, num_rows: int, device: torch.device) -> Rows:
        """Number the rows of a decode step: one row for each sequence."""
        numbers_T = torch.arange(num_rows, device=device)
        return cls(numbers_T, torch.zeros_like(numbers_T))

    def to(self, device: torch.device) -> Rows:
        """Return the same on `device`."""
        return Rows(self.sequence_T.to(device), self.position_T.to(device))


class Candidates(NamedTuple):
    """The slots of T tokens in one layer, as the model's own router proposes them."""

    router_logits_TE: Tensor
    """float32: what the family ranks experts by."""
    top_k_index_TK: Tensor
    """int64; in the family's order, which need not be by weight."""
    top_k_weights_TK: Tensor
    """The family's own weights, in the family's dtype."""
    output_norms_TK: Tensor | None = None
    """float32 norm of each slot's expert output; only for a rule that `needs_output_norms`."""
    rows: Rows | None = None
    """The tokens' sequences; only for a rule whose `unit` isn't the token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerContext:
    """What a rule may know of one layer before the first token."""

    layer: int
    num_experts: int
    model_top_k: int
    """The model's own number of experts a token."""
    device: torch.device
    table: ReferenceTable | None = None
    """The reference of the rule's null in this layer, on `device`; None if it needs none."""
    contributions: Contributions | None = None
    """What is known of slots in all layers, on the CPU; None if the rule needs no such thing."""
    num_layers: int | None = None
    """Layers of the model that have a router; None if only one layer is known."""


Selector = Callable[[Candidates], Tensor]
"""Candidates -> bool tensor (T, K), True where the slot stays; no host sync inside."""


class Rule(ABC):
    """Base of all rules. Subclasses are frozen dataclasses and validate in __post_init__."""

    method: ClassVar[str]
    """The rule's name in the catalog."""
    knob: ClassVar[Knob | None] = None
    """What a search for a mean number of experts turns; None: the rule can't be brought to one."""
    weights: WeightConvention
    """What the kept slots' weights are; see `weights.kept_weights`."""
    temperature: float
    """Divides the router logits; 1.0 leaves the model's own."""
    temperature_weights: TemperatureWeights
    """With another temperature: "mass" keeps the kept slots' sum, "raw" is the ablation."""

    @property
    def required_null(self) -> str | None:
        """Name of the null whose table the rule needs, None if it needs none."""
        return None

    @property
    def keeps_best_by_logit(self) -> bool:
        """Whether what a token keeps is always a number of its best slots by logit."""
        return True

    @property
    def unit(self) -> Unit:
        """The rows decided together; a rule of another unit than the token is told its `Rows`."""
        return "token"

    @property
    def needs_output_norms(self) -> bool:
        """Whether every candidate expert must be run before the rule can decide."""
        return False

    def smallest_alpha(self, num_experts: int) -> float | None:
        """The level that the table of `required_null` must be able to decide, for one expert."""
        return None

    def most_kept(self, model_top_k: int) -> int:
        """Return the most experts per token; more than the model's own k widens its router."""
        return model_top_k

    def num_candidates(self, model_top_k: int) -> int:
        """Return the slots per token that the router must propose, at least the model's own k."""
        return max(model_top_k, self.most_kept(model_top_k))

    @abstractmethod
    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if the rule can't run on a model of this shape."""

    @abstractmethod
    def bind(self, context: LayerContext) -> Selector:
        """Do the work of one layer that doesn't depend on tokens, and return its selector."""

    def slot_p_values(self, context: LayerContext) -> Callable[[Candidates], Tensor] | None:
        """Return what gives each candidate slot its p-value, float64 (T, K): for reports.

        None for a rule that has none.
        """
        return None


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
