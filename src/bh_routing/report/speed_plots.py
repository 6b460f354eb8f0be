"""Time in pictures, from rounds in which all configurations were timed side by side.

Times are shares of the baseline's in the same round: what the titles and intervals are about.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from bh_routing.analysis.speed import SpeedUp
from bh_routing.report import findings
from bh_routing.report.bars import BAR_HEIGHT, BAR_OFFSET, POINTS_OFFSET
from bh_routing.report.style import (
    EDGE_COLOUR,
    colours_of,
    configuration_legend,
    from_zero,
    markers_of,
    new_figure,
    set_title,
    spread,
)
from bh_routing.report.table import Experiments
from bh_routing.report.text import number, short_labels


def draw_relative_times(table: Experiments) -> Figure:
    """Draw one bar a timed configuration with its interval, and its rounds as points."""
    timed, colours = timed_with_baseline(table), colours_of(table.names)
    figure, axes = new_figure(1.6 + 0.46 * len(timed))
    longest = 100 * max(max(found.rounds) for found in timed.values())
    for row, (name, found) in enumerate(timed.items()):
        mean, low, high = (100 * (1 + v) for v in _change(table, name))
        at = row + BAR_OFFSET
        axes.barh(at, mean, BAR_HEIGHT, color=colours[name], edgecolor=EDGE_COLOUR, linewidth=0.6)
        axes.plot([low, high], [at, at], color="black", linewidth=1.6)
        rounds = 100 * np.array(found.rounds)
        axes.scatter(
            rounds, row + POINTS_OFFSET + spread(len(rounds), 0.11), s=13, color=colours[name],
            edgecolor=EDGE_COLOUR, linewidths=0.35, alpha=0.8, zorder=3,
        )  # fmt: skip
        axes.text(
            max(mean, high) + longest * 0.015, at, number(mean, 0), va="center", fontsize=10.5
        )
    axes.set_xlim(0.0, longest * 1.14)
    axes.set_yticks(range(len(timed)), short_labels(list(timed)))
    axes.set_ylim(len(timed) - 0.5, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(f"Time of a text (% of {findings.show(table.baseline)}; points: rounds)")
    set_title(figure, findings.time(table))
    return figure


def draw_experts_vs_speed(table: Experiments) -> Figure:
    """Draw every timed configuration by its mean experts and its time, with the interval."""
    timed, colours, markers = (
        timed_with_baseline(table),
        colours_of(table.names),
        markers_of(table.names),
    )
    figure, axes = new_figure(3.4 + 0.14 * len(timed))
    ends = {name: [100 * (1 + v) for v in _change(table, name)] for name in timed}
    experts = {name: table.mean(name, "avg_experts_per_token") for name in timed}
    for name, (mean, low, high) in ends.items():
        axes.plot([experts[name]] * 2, [low, high], color=colours[name], linewidth=2.0)
        axes.scatter(
            experts[name], mean, s=85, marker=markers[name], color=colours[name],
            edgecolors=EDGE_COLOUR, linewidths=1.0, zorder=3,
        )  # fmt: skip
    from_zero(axes, x=max(experts.values()), y=max(max(values) for values in ends.values()))
    axes.grid()
    axes.set_xlabel("Experts kept per token and layer")
    axes.set_ylabel(f"Time of a text (% of {findings.show(table.baseline)})")
    configuration_legend(figure, list(timed))
    set_title(figure, findings.latency(table))
    return figure


def timed_with_baseline(table: Experiments) -> dict[str, SpeedUp]:
    """Those that were timed in a round with the baseline, and took time in it."""
    return {
        name: found
        for name, found in table.speed_ups.items()
        if found.rounds and np.isfinite([*found.rounds, found.change.mean]).all()
    }


def _change(table: Experiments, name: str) -> tuple[float, float, float]:
    change = table.speed_ups[name].change
    if not np.isfinite(change.low):  # one round has no interval
        return change.mean, change.mean, change.mean
    return change.mean, change.low, change.high
