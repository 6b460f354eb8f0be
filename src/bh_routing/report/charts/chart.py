"""A chart of a run is one function: it takes the run's facts and returns a `Chart`.

`@chart(section)` puts what the function returns into that section of report.html and, under the
function's name, into the run's `plots/`. docs/adding-a-chart.md shows one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bh_routing.report.charts.style import Picture, look, set_title
from bh_routing.report.facts import Facts

SECTIONS: Final = ("quality", "layers", "time")
"""Where a chart can stand, in the order of the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One chart, in one view or in several to choose from."""

    finding: str
    """The title: one sentence on what the numbers show."""
    description: str
    """What is drawn, for readers who can't see it."""
    views: Mapping[str, Callable[[], Picture]]
    """Name -> the function that draws it; `plots/` holds the first."""
    table: Sequence[Sequence[str]] = ()
    """The drawn numbers, the header first."""

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
    """Make a function one of the run's charts; it returns None where the run lacks the data.

    Args:
        section: one of `SECTIONS`, the part of report.html that shows it.
    """
    assert section in SECTIONS, f"{section!r} is none of the sections {', '.join(SECTIONS)}"

    def register(function: ChartFunction) -> ChartFunction:
        CHARTS[function.__name__] = section, function
        return function

    return register


def draw_charts(facts: Facts) -> dict[str, dict[str, Chart]]:
    """Return every chart that the run has data for: section -> name -> chart."""
    made = {name: function(facts) for name, (_, function) in CHARTS.items()}
    return {
        section: {name: c for name, c in made.items() if c and CHARTS[name][0] == section}
        for section in SECTIONS
    }
