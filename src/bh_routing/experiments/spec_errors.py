"""Errors of invalid specs as one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_SHOWN = 60


def describe_error(
    error: ValidationError,
    model: type[BaseModel],
    items: Mapping[str, type[BaseModel]] | None = None,
) -> str:
    """Describe the most informative of pydantic's errors in one sentence.

    Args:
        error: pydantic's exception.
        model: the validated model.
        items: field -> model of its items, for fields that are lists of models.
    """
    found = error.errors(include_url=False)
    # A misspelt key is unknown and leaves another one missing: the former explains both.
    detail = next((item for item in found if item["type"] == "extra_forbidden"), found[0])
    location = list(detail["loc"])
    owner = model
    where = ""
    if len(location) >= 2 and isinstance(location[1], int):
        owner = (items or {}).get(str(location[0]), model)
        where = f"{str(location[0]).removesuffix('s')} {location[1] + 1}"
        location = location[2:]
    field = ".".join(str(part) for part in location)
    known = list(owner.model_fields)
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "remove it"
        return (
            f"{where or 'the run'} has an unknown key {field!r}; known: {', '.join(known)}; {hint}"
        )
    if detail["type"] == "missing":
        return f"{where or 'the run'} has no {field!r}; add it"
    subject = " ".join(part for part in (where, field) if part)
    return f"{subject}: {_message(detail)}" if subject else _message(detail)


def _message(detail: ErrorDetails) -> str:
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    message = detail["msg"].removeprefix("Input should be ")
    shown = repr(detail["input"])
    shown = shorten(shown)
    return f"must be {message}, got {shown}; change it"


def shorten(text: str) -> str:
    """Truncate a text for a message."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
