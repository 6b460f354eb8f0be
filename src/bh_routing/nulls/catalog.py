"""Catalog of null distributions by name, and p-values computed from router logits."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from torch import Tensor

from bh_routing.errors import InputError, unknown_name
from bh_routing.nulls.base import Null, ReferenceTable
from bh_routing.nulls.centred import (
    Background,
    BackgroundStudentized,
    Gaussian,
    PerExpert,
    Permutation,
    Pooled,
    Softmax,
)
from bh_routing.nulls.contributions import OF_SLOTS

_ALL: Final[tuple[Null, ...]] = (
    Background(),
    BackgroundStudentized(),
    Gaussian(),
    PerExpert(),
    Permutation(),
    Pooled(),
    Softmax(),
)

NULLS: Final[Mapping[str, Null]] = MappingProxyType({null.name: null for null in _ALL})


def get_null(name: str) -> Null:
    """Return the null of this name.

    Raises:
        InputError: the name is unknown; the message lists the names and suggests the nearest.
    Example:
        >>> get_null("gaussian").alpha_is
        'error rate'
    """
    if not isinstance(name, str) or name not in NULLS:
        raise unknown_name("null", str(name), NULLS)
    return NULLS[name]


def is_calibrated(name: str) -> bool:
    """Return whether rules of a null need a calibration: its tables, or observed slots.

    Raises:
        InputError: the name is unknown.
    Example:
        >>> is_calibrated("background"), is_calibrated("needed"), is_calibrated("gaussian")
        (True, True, False)
    """
    return name in OF_SLOTS or get_null(name).needs_table


def check_router_logits(router_logits_TE: Tensor) -> None:
    """Raise InputError unless these are floating, finite logits of at least one expert."""
    if not isinstance(router_logits_TE, Tensor) or not router_logits_TE.is_floating_point():
        kind = getattr(router_logits_TE, "dtype", type(router_logits_TE).__name__)
        raise InputError(f"router_logits must be a floating-point tensor, got {kind}")
    if router_logits_TE.ndim == 0 or router_logits_TE.shape[-1] == 0:
        raise InputError(
            "router_logits need at least one expert on the last axis, got shape "
            f"{tuple(router_logits_TE.shape)}"
        )
    num_bad = router_logits_TE.numel() - int(router_logits_TE.isfinite().sum())
    if num_bad:
        raise InputError(
            f"router_logits must be finite, got {num_bad} NaN or infinite of "
            f"{router_logits_TE.numel()} values"
        )


def check_temperature(temperature: float) -> None:
    """Raise InputError unless the temperature is a finite number above 0."""
    is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not is_number or not 0.0 < temperature < float("inf"):
        raise InputError(
            f"temperature must be a finite number above 0, got {temperature!r}; 1.0 leaves the "
            "model's own"
        )


def p_values(
    router_logits: Tensor,
    null: str,
    table: ReferenceTable | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Convert router logits to p-values: the null distribution's upper tail at each score.

    Args:
        router_logits: finite logits of any floating dtype, shape (..., E).
        null: name of the null distribution, such as "gaussian".
        table: the layer's reference table, for a null that needs one.
        temperature: divides the logits; cancels in every null but "softmax".
    Returns:
        float64 tensor of the same shape.
    Raises:
        InputError: unknown null, logits that are not finite, or a temperature not above 0.
        CalibrationError: the null needs a table and none was given.
    Example:
        >>> import torch
        >>> p_values(torch.tensor([[0.0, 1.0, 2.0, 3.0, 40.0]]), "gaussian").argmin().item()
        4
    """
    chosen = get_null(null)
    check_temperature(temperature)
    check_router_logits(router_logits)
    return chosen.p_from_score(chosen.score(router_logits, temperature), table)
