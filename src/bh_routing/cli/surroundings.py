"""What a caller of `main` may replace: configurations, prompts and the last three steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """None stands for the library's own."""

    configs: dict[str, dict[str, Any]] | None = None
    """Name -> configuration."""
    prompts: list[dict[str, Any]] | None = None
    """Prompts as plain data."""
    analyze: Callable[[Any], dict[str, Any]] | None = None
    """Table of experiments -> summary."""
    visualize: Callable[[Any, Any], Any] | None = None
    """Table and folder -> plots."""
    report: Callable[[Any, dict[str, Any], Any], Any] | None = None
    """Table, summary and folder -> report."""
    command: str | None = None
    """What was typed; `main` fills it in."""
