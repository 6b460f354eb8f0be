"""Elements of charts: bars, heat maps, points with intervals, legends and axes.

Axes: Y rows, X columns, n values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from bh_routing.report.charts.chart import Chart
from bh_routing.report.charts.style import INK, PAPER, Picture, looks_of, new_figure
from bh_routing.report.text import MISSING, number, plain, short_labels

Floats = NDArray[np.float64]
Looks = Mapping[str, tuple[str, str]]
"""Name -> colour and marker."""
CELLS_WITH_NUMBERS: Final = 100
CELLS_WITH_TIPS: Final = 2048
"""Above this number of cells, tips would make report.html large."""
MAX_LOSS_TICKS: Final = 11


class Bar(NamedTuple):
    """One bar with its dots and reference; NaN is left out."""

    name: str
    value: float
    dots: Sequence[float] = ()
    """Individual values."""
    low: float = math.nan
    high: float = math.nan
    reference: float = math.nan
    """Value for comparison, drawn as a line across the bar."""
    colour: str = ""
    """Colour of the bar; by default that of its name."""


class Point(NamedTuple):
    """One marker with its interval, which is left out if an end is unknown."""

    name: str
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    tip: str = ""


def bar_chart(
    finding: str, bars: Sequence[Bar], label: str, *, dots: str = "", lines: str = ""
) -> Chart:
    """Make a chart of horizontal bars, first on top, with individual values as dots below.

    Args:
        label: label of the value axis, with unit.
        dots, lines: descriptions of the dots and references.
    """
    notes = [f"dots: {dots}"] * any(bar.dots for bar in bars)
    notes += [f"lines: {lines}"] * any(math.isfinite(bar.reference) for bar in bars)
    header = ("configuration", "value", "low", "high", lines)
    cells = [(plain(b.name, 40), *map(number, (b.value, *b[3:6]))) for b in bars]
    shown = [i for i in range(5) if i < 2 or any(row[i] != MISSING for row in cells)]
    return Chart(
        finding=finding,
        description=f"{label} by configuration{'; '.join(['', *notes])}.",
        views={"": lambda: _draw_bars(bars, f"{label}\n{'; '.join(notes)}".strip())},
        table=[[row[i] for i in shown] for row in (header, *cells)],
    )


def _draw_bars(bars: Sequence[Bar], label: str) -> Picture:
    up = 0.17 * any(bar.dots for bar in bars)
    figure, axes = new_figure(0.9 + (0.42 if up else 0.34) * len(bars))
    known = looks_of(bar.name for bar in bars)
    drawn = [v for bar in bars for v in (bar.value, *bar.dots, bar.high, bar.reference)]
    longest = max([v for v in drawn if math.isfinite(v)], default=0.0) or 1.0
    for row, bar in enumerate(bars):
        at, looks = row - up, {"color": bar.colour or known[bar.name][0], "edgecolor": INK}
        if math.isfinite(bar.value):
            axes.barh(at, bar.value, 0.42 if up else 0.6, linewidth=0.6, **looks)
        axes.plot([bar.low, bar.high], [at, at], color=INK, linewidth=1.8)
        strip = row + 0.25 + spread(len(bar.dots), 0.1)
        axes.scatter(bar.dots, strip, s=12, linewidths=0.3, alpha=0.8, zorder=3, **looks)
        for colour, width in ((PAPER, 4.0), (INK, 2.0)):
            axes.plot([bar.reference] * 2, [at - 0.27, at + 0.27], color=colour, linewidth=width)
        shown = number(bar.value, 0 if longest > 50 else 2)
        end = max(v for v in (bar.value, bar.high, bar.reference, 0.0) if math.isfinite(v))
        axes.text(end + 0.015 * longest, at, "no value" if shown == MISSING else shown, va="center")
        ends = f", {number(bar.low)} to {number(bar.high)}" if bar.low < bar.high else ""
        figure.tip(axes, end / 2, at, f"{plain(bar.name, 60)}: {number(bar.value)}{ends}")
    axes.set_xlim(0.0, 1.14 * longest)
    axes.set_yticks(range(len(bars)), short_labels([bar.name for bar in bars]))
    axes.set_ylim(len(bars) - 0.5, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(label)
    return figure


def spread(count: int, half_width: float) -> Floats:
    """Return deterministic offsets that spread dots evenly over a strip."""
    golden = 0.618_033_988_75
    return np.asarray((((np.arange(count) * golden) % 1.0) * 2.0 - 1.0) * half_width)


def draw_heat_map(
    values_YX: Floats,
    rows: Sequence[str] | range,
    columns: Sequence[str] | range,
    labels: tuple[str, str, str],
) -> Picture:
    """Draw a table of numbers as colours, with the numbers shown if they fit.

    Args:
        rows, columns: names, or a range of numbers.
        labels: labels of the columns' axis, the rows' axis and the colour bar.
    """
    height, width = values_YX.shape
    is_turned = not isinstance(columns, range) and width > 3
    degrees = 90 if width > 12 else 30
    ticks = [] if isinstance(columns, range) else short_labels(columns)
    room = 0.075 * max(map(len, ticks)) * math.sin(math.radians(degrees)) if is_turned else 0.0
    body = min((0.2 if isinstance(rows, range) else 0.3) * height, 6.0)
    figure, axes = new_figure(1.2 + room + body)
    image = axes.imshow(values_YX, aspect="auto", interpolation="nearest", vmin=0.0)
    figure.colorbar(image, ax=axes, pad=0.02).set_label(labels[2])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel=labels[0], ylabel=labels[1] if isinstance(rows, range) else "")
    named = []
    for axis, names, label in ((axes.xaxis, columns, labels[0]), (axes.yaxis, rows, labels[1])):
        if isinstance(names, range):
            axis.set_major_locator(MaxNLocator(12, integer=True))
            named.append([f"{label.lower()} {i}" for i in names])
        else:
            axis.set_ticks(range(len(names)), short_labels(names))
            named.append([plain(name, 40) for name in names])
    if is_turned:
        axes.tick_params(axis="x", labelrotation=degrees)
        for text in axes.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor", va="center" if width > 12 else "top")
    middle = np.nanmax(values_YX, initial=0.0) / 2
    is_whole = 2 * middle > 20 or bool((values_YX == values_YX.round()).all())
    for (row, column), value in np.ndenumerate(values_YX):
        shown = number(value, 0 if is_whole else 1)
        if values_YX.size <= CELLS_WITH_NUMBERS:
            colour = "#fefefe" if value <= middle else "#010101"  # the same in both themes
            axes.text(column, row, shown, ha="center", va="center", color=colour, fontsize=9,
                      in_layout=False)  # fmt: skip
        if values_YX.size <= CELLS_WITH_TIPS:
            cell = f"{named[1][row]}, {named[0][column]}: {number(value)}"
            figure.tip(axes, column, row, cell)
    return figure


def table_of(
    values_YX: Floats, rows: Sequence[str], columns: Iterable[object]
) -> list[tuple[str, ...]]:
    """Return the numbers of a heat map for `Chart.table`."""
    return [
        ("configuration", *(plain(column, 40) for column in columns)),
        *((plain(name, 40), *map(number, row)) for name, row in zip(rows, values_YX, strict=True)),
    ]


def draw_points(figure: Picture, axes: Axes, points: Iterable[Point], looks: Looks) -> None:
    """Draw each point with its interval, as the marker of its name."""
    for point in points:
        if math.isfinite(point.low) and math.isfinite(point.high):
            axes.vlines(
                point.x, point.low, point.high, color=looks[point.name][0], lw=1.8, zorder=3
            )
        axes.plot(point.x, point.y, **_marker(looks[point.name]))
        if point.tip:
            figure.tip(axes, point.x, point.y, point.tip)


def add_legend(figure: Figure, looks: Looks, *others: Line2D) -> None:
    """Add a legend of markers below the axes, after other labelled lines."""
    handles = [*others, *(Line2D([], [], **_marker(look)) for look in looks.values())]
    labels = [*(str(line.get_label()) for line in others), *short_labels(list(looks), 60)]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3 if max(map(len, labels), default=0) <= 16 else 2,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def _marker(look: tuple[str, str]) -> dict[str, Any]:
    return {
        "linestyle": "none", "color": look[0], "marker": look[1], "markersize": 7.5,
        "markeredgecolor": INK, "markeredgewidth": 0.7, "zorder": 4,
    }  # fmt: skip


def loss_axis(axes: Axes, losses: Iterable[float]) -> None:
    """Scale the vertical axis, in percent, so that 1 % and 500 % are both legible.

    The scale is linear around 0 and logarithmic beyond (asinh), also below 0.

    Args:
        losses: percentages to show; NaN is ignored.
    """
    seen = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    unit = 1.0 if max(map(abs, seen)) > 5.0 else 0.1
    low, high = (math.asinh(end / unit) for end in (min(seen), max(seen)))
    room = 0.06 * (high - low) or 1.0
    bottom, top = (unit * math.sinh(end) for end in (low - room, high + room))
    axes.set_yscale("asinh", linear_width=unit)
    axes.set_ylim(bottom, top)
    steps = [m * 10.0**e for e in range(-1, 24) for m in (1, 2, 5) if m * 10.0**e >= unit]
    shown = [0.0]
    for every in (12, 6, 3, 2, 1):
        chosen = [0.0, *steps[::every], *(-step for step in steps[::every])]
        inside = sorted(tick for tick in chosen if bottom <= tick <= top)
        shown = inside if len(inside) <= MAX_LOSS_TICKS else shown
    axes.yaxis.set_major_locator(FixedLocator(shown))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+,g}" if v else "0"))


def percent_change(delta_nll: float) -> float:
    """Convert a difference in NLL to a change in perplexity, in percent.

    Example:
        >>> round(percent_change(0.0953), 2)
        10.0
    """
    return 100.0 * math.expm1(min(delta_nll, 50.0))


def from_zero(axes: Axes, *, x: float = math.nan, y: float = math.nan) -> None:
    """Start an axis at 0 and leave room beyond its largest value."""
    if math.isfinite(x) and x > 0:
        axes.set_xlim(0.0, 1.06 * x)
    if math.isfinite(y) and y > 0:
        axes.set_ylim(0.0, 1.1 * y)
