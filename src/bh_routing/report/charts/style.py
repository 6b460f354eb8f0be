"""Style of all charts (fonts, colours, sizes), and export of figures to files.

Figures are made without pyplot, so the caller's backend, windows and settings don't change.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bh_routing.errors import InputError
from bh_routing.report.text import for_plot
from bh_routing.results.files import write_bytes

# At this width, text is about 7 points high when printed half a page wide.
WIDTH_INCHES: Final = 5.4
DPI: Final = 150
MAX_HEIGHT_INCHES: Final = 14.0
FIGURE_KINDS: Final = ("png", "pdf", "svg", "jpg")

INK: Final = "#1c1f24"
SOFT: Final = "#555b66"
GRID: Final = "#d4d8de"
PAPER: Final = "#ffffff"
BASELINE: Final = "#4d4d4d"
BLUE: Final = "#0072b2"
ORANGE: Final = "#e69f00"
# Okabe & Ito (2008), distinguishable with all common forms of colour blindness. The five
# configurations of the standard run have the same colour and marker in every chart and run.
FIXED_LOOKS: Final = {
    "topk_8": (BASELINE, "o"),
    "bh_strict": (BLUE, "s"),
    "bh_moderate": ("#009e73", "^"),
    "bh_loose": (ORANGE, "D"),
    "bh_adaptive": ("#cc79a7", "v"),
}
OTHER_COLOURS: Final = ("#d55e00", "#56b4e9", "#8c6d1f", "#332288", "#882255", "#44aa99")
OTHER_MARKERS: Final = ("P", "X", "*", "<", ">", "p", "h", "d", "8")
DARK: Final = {
    INK: "#e8eaee",
    SOFT: "#aab1bd",
    GRID: "#3a414c",
    PAPER: "#15181d",
    BASELINE: "#b4b4b4",
    BLUE: "#3f9fdb",
    "#8c6d1f": "#c39a35",
    "#332288": "#9485ee",
    "#882255": "#d56c9d",
}
"""Colours too dark for the HTML report's dark theme -> their replacements."""

SETTINGS: Final[Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 10.0,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "image.cmap": "cividis",
    "savefig.dpi": DPI,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a prompt may hold dollar signs
}


_UNUSED: Final = re.compile(
    r"<metadata>.*?</metadata>|<!--.*?-->|(?<=<g) id=\"[^\"]*\"|font-family: 'DejaVu Sans'; "
    r"| transform=\"rotate\(-0 [^\"]*\"",
    re.DOTALL,
)


@contextmanager
def look() -> Iterator[None]:
    """Apply the settings above inside the block, then restore the caller's."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(SETTINGS)
        yield


class Picture(Figure):
    """Figure that notebooks display, with tooltips for report.html."""

    tips: list[tuple[Axes, float, float, str]]

    def tip(self, axes: Axes, x: float, y: float, text: str) -> None:
        """Add a tooltip for report.html at (x, y), in data coordinates."""
        self.tips.append((axes, x, y, text))

    def _repr_png_(self) -> bytes:
        return rendered(self, "png")


def new_figure(
    height_inches: float, *, width_inches: float = WIDTH_INCHES, **grid: Any
) -> tuple[Picture, Any]:
    """Make a figure and its axes, with a layout that cuts nothing off.

    Args:
        height_inches: height, limited to `MAX_HEIGHT_INCHES`.
        grid: arguments of `Figure.subplots`, which determine whether axes or an array is returned.
    """
    height = min(height_inches, MAX_HEIGHT_INCHES)
    figure = Picture(figsize=(width_inches, height), dpi=DPI, layout="constrained")
    figure.tips = []
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**grid)


def set_title(figure: Figure, finding: str) -> None:
    """Set the finding as title, wrapped to the width; each further line makes the figure taller."""
    # Keep a number and its percent sign on one line.
    text = for_plot(finding).replace(" %", "\u00a0%")
    width = int(10.2 * figure.get_figwidth())
    lines = textwrap.wrap(text, width)
    height = figure.get_figheight() + 0.18 * (len(lines) - 1)
    figure.set_figheight(min(height, MAX_HEIGHT_INCHES))
    figure.suptitle("\n".join(lines), x=0.012, ha="left")


def rendered(figure: Figure, kind: str, **options: Any) -> bytes:
    """Render the figure to the bytes of a file of this kind."""
    buffer = io.BytesIO()
    with look():  # ticks are created and styled while drawing
        figure.savefig(buffer, format=kind, dpi=DPI, **options)
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> Path:
    """Write the figure atomically.

    Raises:
        InputError: the file's suffix isn't a supported format.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in FIGURE_KINDS:
        raise InputError(f"a figure's file must end in {', '.join(FIGURE_KINDS)}; got {path.name}")
    return write_bytes(path, rendered(figure, kind))


def inline_svg(figure: Picture, salt: str) -> str:
    """Render the figure as an SVG element for HTML, which scales and follows the theme.

    Its attribute `data-tips` has [x, y, text] of each tooltip, x and y in thousandths of the
    figure's width and height from the upper left corner.

    Args:
        salt: makes the ids of several figures in one document distinct.
    """
    with look():
        mpl.rcParams["svg.hashsalt"] = salt
        figure.savefig(buffer := io.StringIO(), format="svg", transparent=True)
    text = buffer.getvalue()
    text = _UNUSED.sub("", text[text.index("<svg ") :])
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'="[^"]*"', lambda found: _short(found[0]), text)
    text = re.sub(r">\s+<", "><", text).strip()
    width, height = figure.bbox.size
    tips = []
    for axes, x, y, shown in figure.tips:
        left, bottom = axes.transData.transform((x, y))
        if math.isfinite(left + bottom):
            tips.append([round(1000 * left / width), round(1000 * (1 - bottom / height)), shown])
    data = html.escape(json.dumps(tips, ensure_ascii=False, separators=(",", ":")))
    return text.replace("<svg ", f'<svg data-tips="{data}" ', 1)


def _short(attribute: str) -> str:
    """Replace themed colours by CSS variables, and round coordinates to visible precision."""
    text = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(attribute.split()))
    return re.sub(r"#([0-9a-f]{6})\b", lambda c: f"var(--c{c[1]})" if c[0] in DARK else c[0], text)


def theme(*, dark: bool) -> str:
    """Return the CSS declarations of the charts' colours in a theme."""
    return "".join(f"--c{c[1:]}:{DARK[c] if dark else c};" for c in DARK)


def looks_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Assign a colour and a marker to each name: fixed for the standard five, then in order.

    Colour is never the only difference.
    """
    others = zip(cycle(OTHER_COLOURS), cycle(OTHER_MARKERS), strict=False)
    return {name: FIXED_LOOKS.get(name) or next(others) for name in dict.fromkeys(names)}
