"""Validation of what rules are made of: each check names the value, the range and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from bh_routing.errors import InputError, unknown_name
from bh_routing.nulls.catalog import check_temperature
from bh_routing.rules.base import TemperatureWeights, WeightConvention


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
