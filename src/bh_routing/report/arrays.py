"""Convert lists, arrays, Series and tensors to numpy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bh_routing.errors import InputError


def numbers(values: Any, what: str) -> NDArray[np.float64]:
    """Return counts, means or fractions as a float64 array of the same shape.

    Tensors are recognised by duck typing, so torch isn't required.

    Args:
        values: a list, array, Series, DataFrame or tensor, on any device.
        what: name of the values in error messages.
    Raises:
        InputError: the values include text or a negative number, or none is finite.
    """
    for step in ("detach", "cpu"):
        values = getattr(values, step)() if hasattr(values, step) else values
    if hasattr(values, "is_floating_point") and values.is_floating_point():
        values = values.double()  # numpy has no bfloat16
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{what} must be numbers in a list, array, Series or tensor: {error}"
        ) from error
    finite = array[np.isfinite(array)]
    if not finite.size:
        raise InputError(f"{what} must hold at least one finite number, got {array.size} values")
    if finite.min() < 0:
        raise InputError(f"{what} must not be negative, got {finite.min():g}")
    return np.where(np.isfinite(array), array, np.nan)
