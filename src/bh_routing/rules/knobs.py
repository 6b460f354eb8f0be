"""A rule's knob: the one number that trades experts for quality, and how to search it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

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
