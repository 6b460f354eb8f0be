"""JSON that every parser reads: no NaN, no infinity, no numpy types, always valid UTF-8."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bh_routing.errors import ResultsError

RESTORE = "put the file back as it was, or use another output folder"


def to_strict(value: Any) -> Any:
    """Return `value` as plain dicts, lists, strings, numbers and None; NaN and infinity are None.

    Args:
        value: mappings, sequences, dataclasses, paths, numpy arrays and scalars, in any nesting.
    Returns:
        Data that `json.dumps(..., allow_nan=False)` accepts.
    Raises:
        TypeError: a value in it has no JSON form.
    Example:
        >>> to_strict({"p": float("nan"), "n": np.int64(3)})
        {'p': None, 'n': 3}
    """
    if value is None or isinstance(value, (str, int)):  # most, so first; bool is an int
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.generic, np.ndarray)):
        return to_strict(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_strict(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not asdict: it would copy nested values before they are converted.
        return {f.name: to_strict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


def render_json(value: Any) -> bytes:
    """Render as indented JSON with a final newline."""
    return _encode(json.dumps(to_strict(value), ensure_ascii=False, indent=2, allow_nan=False))


def render_json_line(value: Any) -> bytes:
    """Render as one line of JSON with its newline."""
    return _encode(
        json.dumps(to_strict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    )


def render_json_lines(values: Iterable[Any]) -> bytes:
    """Render as JSON lines."""
    return b"".join(map(render_json_line, values))


def _encode(text: str) -> bytes:
    # A lone surrogate, as in a path that isn't UTF-8, becomes \udcXX: an escape that JSON knows.
    return f"{text}\n".encode(errors="backslashreplace")


def read_json_object(path: Path, remedy: str = RESTORE) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        remedy: advice that ends the error's sentence.
    Raises:
        ResultsError: the file can't be read, or isn't a whole JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise half_read(path, error.strerror or str(error), remedy) from error
    except (ValueError, RecursionError) as error:
        raise half_read(path, f"it isn't JSON ({error})", remedy) from error
    if not isinstance(value, dict):
        raise half_read(path, f"it holds a {type(value).__name__}, not a JSON object", remedy)
    return value


def find_json_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object as `read_json_object` does; None if there is no such file."""
    return read_json_object(path) if path.is_file() else None


def half_read(path: Path | None, what: str, remedy: str = RESTORE) -> ResultsError:
    """Build the error for a file that can't be read whole."""
    return ResultsError(f"{path or 'the journal'} can't be read whole: {what}; {remedy}")
