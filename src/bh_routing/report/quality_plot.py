"""Quality lost against experts kept: the picture that decides whether anything was saved."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bh_routing.report import findings
from bh_routing.report.quality import QualityRow
from bh_routing.report.style import (
    BASELINE_COLOUR,
    EDGE_COLOUR,
    GUIDE_COLOUR,
    colours_of,
    configuration_legend,
    from_zero,
    markers_of,
    new_figure,
    set_title,
)

QUALITY_PLOT: Final = "quality_vs_experts.png"
LABEL_UP_TO: Final = 100.0
"""The margin is named up to an axis this many times as high."""


def draw_quality(rows: list[QualityRow], margin: float) -> Figure:
    """Draw the change in perplexity against mean experts, with 95 % intervals.

    Args:
        rows: one a configuration, the model's own top-k among them or not.
        margin: the ΔNLL that still counts as no loss, in nats a token.
    """
    names = [row.name for row in rows]
    figure, axes = new_figure(3.5 + 0.14 * len(names))
    colours, markers = colours_of(names), markers_of(names)
    # Static top-k is the bar to beat, not a contestant: one grey for all of it.
    colours |= {row.name: BASELINE_COLOUR for row in rows if row.is_static}
    _static_curve(axes, rows)
    for row in rows:
        axes.errorbar(
            row.mean_experts, percent_change(row.delta_nll), yerr=_whiskers(row),
            fmt=markers[row.name], color=colours[row.name], markersize=9,
            markeredgecolor=EDGE_COLOUR, capsize=4,
            linewidth=1.8, zorder=3,
        )  # fmt: skip
    bound = percent_change(margin)
    axes.axhline(0.0, color=EDGE_COLOUR, linewidth=0.9)
    axes.axhline(bound, color=GUIDE_COLOUR, linewidth=1.2, linestyle=(0, (4, 3)))
    # On a scale of large losses the line is all but the zero line; a label would sit on points.
    near = axes.get_ylim()[1] < LABEL_UP_TO * bound
    axes.annotate(
        f"margin +{bound:.1f} %" if near else "", (0.01, bound), xycoords=("axes fraction", "data"),
        xytext=(0, 3), textcoords="offset points", color="#555555", fontsize=9.5,
    )  # fmt: skip
    from_zero(axes, x=max(row.mean_experts for row in rows))
    axes.grid()
    axes.set_xlabel("Experts kept per token and layer")
    axes.set_ylabel("Change in perplexity (%)")
    configuration_legend(figure, names, colours)
    set_title(figure, findings.quality(rows))
    return figure


def percent_change(delta_nll: float) -> float:
    """Change in perplexity, in percent, that a difference in NLL is.

    Example:
        >>> round(percent_change(0.0953), 2)
        10.0
    """
    return 100.0 * math.expm1(min(delta_nll, 50.0))


def _whiskers(row: QualityRow) -> np.ndarray | None:
    middle = percent_change(row.delta_nll)
    ends = percent_change(row.low), percent_change(row.high)
    if not all(map(math.isfinite, ends)):
        return None
    return np.array([[max(middle - ends[0], 0.0)], [max(ends[1] - middle, 0.0)]])


def _static_curve(axes: Axes, rows: list[QualityRow]) -> None:
    curve = sorted(
        (row.mean_experts, percent_change(row.delta_nll)) for row in rows if row.is_static
    )
    if len(curve) > 1:
        axes.plot(*zip(*curve, strict=True), color=GUIDE_COLOUR, linewidth=1.4, zorder=1)
