"""Run a model's experts by another function for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


@contextmanager
def experts_by(model: Any, name: str, function: Callable[..., Any] | None = None) -> Iterator[None]:
    """Let transformers run the model's experts by `name` inside a `with` block.

    Args:
        model: a transformers model.
        name: an implementation that transformers knows, or the name of `function`.
        function: registered under `name`; None if transformers knows the name.
    """
    if function is not None and name not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(name, function)
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
