"""What every chart of the page is made of: a finding, a description, figures and their numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Figure = dict[str, Any]
"""`{"data": [...], "layout": {...}}`, as Plotly takes it."""

MARKERS: Final = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "triangle-down",
    "x",
    "star",
    "cross",
)
SEQUENTIAL: Final = "Viridis"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A figure that the page draws, in one variant or several to choose from."""

    key: str
    """Its id on the page."""
    finding: str
    """The title: what the numbers show."""
    description: str
    """What is drawn, for whoever can't see it."""
    variants: Mapping[str, Figure]
    chooser: str = ""
    """What the variants are, if there are several."""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    """The drawn numbers as a table."""
    height: int = 380


def markers(names: Sequence[str]) -> dict[str, str]:
    """Give each configuration a marker, so that colour is never the only difference."""
    return {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}


def axis(title: str, **settings: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, "automargin": True, **settings}


def finite(value: float, digits: int = 6) -> float | None:
    """A number that JSON can hold: None for what isn't one."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def finite_list(values: Iterable[float], digits: int = 4) -> list[float | None]:
    """The same for a list."""
    return [finite(float(value), digits) for value in values]
