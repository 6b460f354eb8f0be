"""Numbers from whatever holds them: lists, arrays, Series, tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bh_routing.errors import InputError


def numbers(values: Any, what: str) -> NDArray[np.float64]:
    """Return counts, means or shares as a float64 array of the same shape.

    A tensor is recognised by what it can do, so torch needn't be there.

    Args:
        values: a list, array, Series, DataFrame or tensor, on any device.
        what: its name in error messages.
    Raises:
        InputError: it holds text, no finite number, or a negative one.
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
