"""Nested settings as one flat mapping, for whoever compares or lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(prefix: str, value: Any) -> dict[str, Any]:
    """Return every leaf under its dotted path.

    Example:
        >>> flatten("spec", {"seed": 0, "configs": {"a": {"k": 8}}})
        {'spec.seed': 0, 'spec.configs.a.k': 8}
    """
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        path: leaf
        for key, child in value.items()
        for path, leaf in flatten(f"{prefix}.{key}", child).items()
    }
