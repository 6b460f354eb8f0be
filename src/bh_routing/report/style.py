"""One look for every picture: fonts, colours, sizes, and how a file is written.

Figures are made without pyplot, so nobody's backend, open windows or settings change.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bh_routing.errors import InputError
from bh_routing.report.files import write_bytes
from bh_routing.report.text import for_plot, short_labels

# A figure of this width keeps its text at about 7 points when printed half a page wide.
WIDTH_INCHES: Final = 5.4
DPI: Final = 150
MAX_HEIGHT_INCHES: Final = 14.0
FIGURE_KINDS: Final = ("png", "pdf", "svg", "jpg")

BASELINE_COLOUR: Final = "#4d4d4d"
GUIDE_COLOUR: Final = "#767676"
EDGE_COLOUR: Final = "#333333"
# Okabe & Ito (2008), told apart with every common form of colour blindness. The five
# configurations of the standard run keep theirs in every picture and every run.
FIXED_COLOURS: Final = {
    "topk_8": BASELINE_COLOUR,
    "bh_strict": "#0072b2",
    "bh_moderate": "#009e73",
    "bh_loose": "#e69f00",
    "bh_adaptive": "#cc79a7",
}
OTHER_COLOURS: Final = ("#d55e00", "#56b4e9", "#8c6d1f", "#f0e442", "#332288", "#882255", "#44aa99")
FIXED_MARKERS: Final = {
    "topk_8": "o",
    "bh_strict": "s",
    "bh_moderate": "^",
    "bh_loose": "D",
    "bh_adaptive": "v",
}
OTHER_MARKERS: Final = ("P", "X", "*", "<", ">", "p", "h", "d", "8")

SETTINGS: Final = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11.0,
    "axes.titlesize": 11.0,
    "axes.labelsize": 11.0,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.0,
    "legend.frameon": False,
    "figure.titlesize": 12.0,
    "figure.titleweight": "bold",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "savefig.dpi": DPI,
    "text.usetex": False,
    "text.parse_math": False,  # a prompt may hold dollar signs
}


@contextmanager
def look() -> Iterator[None]:
    """Apply the settings above inside the block and put the caller's back after it."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)  # type: ignore[arg-type]
        yield


class Picture(Figure):
    """A figure that notebooks show by themselves, without a plotting window behind it."""

    def _repr_png_(self) -> bytes:
        return rendered(self, "png")


def new_figure(height_inches: float, width_inches: float = WIDTH_INCHES) -> tuple[Figure, Axes]:
    """Make a figure with one set of axes, laid out so that nothing is cut off."""
    height = min(height_inches, MAX_HEIGHT_INCHES)
    figure = Picture(figsize=(width_inches, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def set_title(figure: Figure, finding: str, width: int = 52) -> None:
    """Put the finding on top, wrapped, flush left with the figure."""
    # A number and its percent sign stay on one line.
    text = for_plot(finding).replace(" %", "\u00a0%")
    figure.suptitle(textwrap.fill(text, width), x=0.012, ha="left")


def rendered(figure: Figure, kind: str) -> bytes:
    """Draw the figure into the bytes of a file of this kind."""
    buffer = io.BytesIO()
    with look():  # ticks are made while drawing, and take their looks from the settings then
        figure.savefig(buffer, format=kind, dpi=DPI)
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> Path:
    """Write the figure so that a reader sees the old file or the new one, never half of one.

    Raises:
        InputError: the file's ending isn't one that figures can be written as.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in FIGURE_KINDS:
        raise InputError(f"a figure's file must end in {', '.join(FIGURE_KINDS)}; got {path.name}")
    return write_bytes(path, rendered(figure, kind))


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """Give each configuration its colour: fixed for the standard five, then in order."""
    return _assign(names, FIXED_COLOURS, OTHER_COLOURS)


def _assign(
    names: Sequence[str], fixed: Mapping[str, str], others: Sequence[str]
) -> dict[str, str]:
    rest = [name for name in names if name not in fixed]
    given = {name: others[i % len(others)] for i, name in enumerate(rest)}
    return {name: fixed.get(name) or given[name] for name in names}


def markers_of(names: Sequence[str]) -> dict[str, str]:
    """Give each configuration a marker, so that colour is never the only difference."""
    return _assign(names, FIXED_MARKERS, OTHER_MARKERS)


def spread(count: int, half_width: float) -> np.ndarray:
    """Offsets that keep points apart: the same at every call, evenly filling the strip."""
    golden = 0.618_033_988_75
    return (((np.arange(count) * golden) % 1.0) * 2.0 - 1.0) * half_width


def configuration_legend(
    figure: Figure, names: Sequence[str], colours: Mapping[str, str] | None = None
) -> None:
    """List the configurations below the axes."""
    colours, markers = colours or colours_of(names), markers_of(names)
    labels = short_labels(names)
    handles = [
        Line2D(
            [], [], linestyle="none", marker=markers[name], color=colours[name],
            markeredgecolor=EDGE_COLOUR, markersize=7,
        )
        for name in names
    ]  # fmt: skip
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3 if max(map(len, labels), default=0) <= 14 else 2,
        handletextpad=0.2,
        columnspacing=1.0,
    )


def from_zero(axes: Axes, *, x: float | None = None, y: float | None = None) -> None:
    """Start an axis at 0 and leave room behind its largest value."""
    if x is not None and np.isfinite(x) and x > 0:
        axes.set_xlim(0.0, 1.06 * x)
    if y is not None and np.isfinite(y) and y > 0:
        axes.set_ylim(0.0, 1.1 * y)
