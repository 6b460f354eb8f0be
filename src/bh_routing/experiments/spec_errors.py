"""Errors of invalid specs as one sentence, and the commands that errors of the library advise."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Final

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


def name_commands(text: str) -> str:
    """Replace the calls of Python that a message of the library advises by commands.

    Example:
        >>> name_commands("run: bh_routing.calibrate(model, tokenizer, texts, nulls=['iid'])")
        'run: bh-routing calibrate --nulls iid --model NAME --output FILE'
        >>> name_commands("see: bh_routing.models.families.family_rows()")
        'see: bh-routing models'
    """
    for call, command in _COMMANDS.items():
        text = re.sub(call, command, text)
    return text


def _calibrate_command(call: re.Match[str]) -> str:
    nulls = f" --nulls {call[1].replace(', ', ',').replace(chr(39), '')}" if call[1] else ""
    tokens = f" --max-tokens {call[2]}" if call[2] else ""
    return f"bh-routing calibrate{nulls}{tokens} --model NAME --output FILE"


_CALIBRATE: Final = (
    r"bh_routing\.calibrate\(model, tokenizer, texts(?:, nulls=\[(.*?)\])?(?:, max_tokens=(\d+))?\)"
)
_COMMANDS: Final[Mapping[str, str | Callable[[re.Match[str]], str]]] = {
    _CALIBRATE: _calibrate_command,
    r"bh_routing\.models\.families\.family_rows\(\)": "bh-routing models",
    r"track_run\(load_results\('(.*)'\), '(\w+)'\)": r"bh-routing report \1 --track \2",
}
"""Pattern of a call -> command."""
