"""Turn results into JSON that every parser reads: no NaN, no infinity, no numpy types."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def to_strict(value: Any) -> Any:
    """Return `value` as plain dicts, lists, strings, numbers and None; NaN and infinity are None.

    Args:
        value: mappings, sequences, dataclasses, numpy arrays and scalars, nested as you like.
    Returns:
        What `json.dumps(..., allow_nan=False)` accepts.
    Raises:
        TypeError: something in it has no JSON form.
    Example:
        >>> to_strict({"p": float("nan"), "n": np.int64(3)})
        {'p': None, 'n': 3}
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return to_strict(value.tolist())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_strict(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not asdict: it would copy nested values before they are converted.
        return {f.name: to_strict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


def dump_strict(value: Any) -> str:
    """Write `to_strict(value)` as indented JSON text that ends with a newline."""
    return json.dumps(to_strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
