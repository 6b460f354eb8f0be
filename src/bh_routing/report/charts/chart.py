"""Registry of a run's charts: each is one function from the run's facts to a `Chart`.

`@chart(section)` adds the chart to that section of report.html and, under the function's name, to
the run's `plots/`. docs/adding-a-chart.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bh_routing.report.charts.style import Picture, look, set_title
from bh_routing.report.facts import Facts

SECTIONS: Final = ("quality", "layers", "time")
"""Sections with charts, in the order of the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One chart, with one view or several to choose from."""

    finding: str
    """Title: the finding in one sentence."""
    description: str
    """Alternative text."""
    views: Mapping[str, Callable[[], Picture]]
    """Name -> drawing function; `plots/` contains the first."""
    table: Sequence[Sequence[str]] = ()
    """The plotted numbers, header first."""

    def picture(self) -> Picture:
        """Draw the first view under the finding."""
        with look():
            figure = next(iter(self.views.values()))()
            set_title(figure, self.finding)
        return figure


ChartFunction = Callable[[Facts], Chart | None]
CHARTS: Final[dict[str, tuple[str, ChartFunction]]] = {}
"""Name -> section and function."""


def chart(section: str) -> Callable[[ChartFunction], ChartFunction]:
    """Register a function as a chart of a run; it returns None if the run lacks the data.

    Args:
        section: section of report.html, one of `SECTIONS`.
    """
    assert section in SECTIONS, f"{section!r} is none of the sections {', '.join(SECTIONS)}"

    def register(function: ChartFunction) -> ChartFunction:
        CHARTS[function.__name__] = section, function
        return function

    return register


def draw_charts(facts: Facts) -> dict[str, dict[str, Chart]]:
    """Return all charts for which the run has data: section -> name -> chart."""
    if not facts.names:
        return {}
    made = {name: function(facts) for name, (_, function) in CHARTS.items()}
    return {
        section: {name: c for name, c in made.items() if c and CHARTS[name][0] == section}
        for section in SECTIONS
    }
