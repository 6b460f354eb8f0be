"""Points on two axes: experts by prompt category, and experts against time."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bh_routing.report import findings
from bh_routing.report.style import (
    EDGE_COLOUR,
    colours_of,
    configuration_legend,
    from_zero,
    markers_of,
    new_figure,
    set_title,
)
from bh_routing.report.table import Experiments
from bh_routing.report.text import number, short_labels

LEGEND_LIMIT = 8
"""More configurations than this are told apart by rows of a table, not by colours."""


def draw_categories(table: Experiments) -> Figure:
    """Draw the mean experts of every configuration in every category of prompts."""
    few = len(table.names) <= LEGEND_LIMIT and len(table.categories) <= LEGEND_LIMIT
    figure = _category_rows(table) if few else _category_grid(table)
    set_title(figure, findings.by_category(table))
    return figure


def _category_rows(table: Experiments) -> Figure:
    names, categories = table.names, table.categories
    height = 0.15 * len(names) + 0.16
    figure, axes = new_figure(1.9 + height * len(categories) + 0.14 * len(names))
    colours, markers = colours_of(names), markers_of(names)
    for row, category in enumerate(categories):
        inside = table.frame["prompt_category"] == category
        for slot, name in enumerate(names):
            at = row + (slot - (len(names) - 1) / 2) * 0.8 / len(names)
            mine = table.frame[inside & (table.frame["config_name"] == name)]
            values_n = mine["avg_experts_per_token"].dropna().to_numpy(np.float64)
            if not len(values_n):
                continue
            axes.scatter(values_n, np.full(len(values_n), at), s=11, color=colours[name], alpha=0.5)
            axes.scatter(
                values_n.mean(), at, s=52, marker=markers[name], color=colours[name],
                edgecolors=EDGE_COLOUR, linewidths=0.8, zorder=3,
            )  # fmt: skip
        if row:
            axes.axhline(row - 0.5, color="#cccccc", linewidth=0.8)
    axes.set_yticks(range(len(categories)), short_labels(categories, 18))
    axes.set_ylim(len(categories) - 0.5, -0.5)
    from_zero(axes, x=float(table.frame["avg_experts_per_token"].max()))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("Experts kept (large: mean, small: one prompt)")
    configuration_legend(figure, names)
    return figure


def _category_grid(table: Experiments) -> Figure:
    """A table of numbers on colour: the form that survives twenty configurations."""
    names, categories = table.names, table.categories
    means_NC = (
        table.frame.pivot_table(
            index="config_name",
            columns="prompt_category",
            values="avg_experts_per_token",
            dropna=False,
        )
        .reindex(index=names, columns=categories)
        .to_numpy(np.float64)
    )
    figure, axes = new_figure(1.9 + 0.34 * len(names))
    image = axes.imshow(means_NC, cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(names)), short_labels(names))
    axes.set_xticks(range(len(categories)), short_labels(categories, 18), rotation=40, ha="right")
    write_cells(axes, means_NC)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("Experts kept per token and layer")
    return figure


def write_cells(axes: Axes, values_YX: np.ndarray, digits: int = 1, limit: int = 260) -> None:
    """Write each number into its cell, dark on light and light on dark; none if too many."""
    if values_YX.size > limit or not np.isfinite(values_YX).any():
        return
    middle = (np.nanmin(values_YX) + np.nanmax(values_YX)) / 2
    for (row, column), value in np.ndenumerate(values_YX):
        colour = "black" if value > middle or not math.isfinite(value) else "white"
        axes.text(
            column, row, number(value, digits), ha="center", va="center", color=colour, fontsize=9.5
        )


def draw_experts_vs_latency(table: Experiments) -> Figure:
    """Draw every experiment, and every configuration's mean, by experts and time a token."""
    names = table.names
    figure, axes = new_figure(3.4 + 0.14 * len(names))
    colours, markers = colours_of(names), markers_of(names)
    frame = table.frame
    # Per token: prompts differ in how soon the model ends, and that isn't the rule's doing.
    tokens_n = frame["num_output_tokens"].where(frame["num_output_tokens"] > 0)
    frame = frame.assign(latency_ms=1000.0 * frame["inference_time_sec"] / tokens_n)
    for name in names:
        mine = frame[frame["config_name"] == name].dropna(
            subset=["latency_ms", "avg_experts_per_token"]
        )
        if mine.empty:
            continue
        experts_n, latency_n = mine["avg_experts_per_token"], mine["latency_ms"]
        axes.scatter(experts_n, latency_n, s=12, color=colours[name], alpha=0.45, linewidths=0)
        axes.scatter(
            experts_n.mean(), latency_n.mean(), s=85, marker=markers[name], color=colours[name],
            edgecolors=EDGE_COLOUR, linewidths=1.0, zorder=3,
        )  # fmt: skip
    from_zero(
        axes, x=float(frame["avg_experts_per_token"].max()), y=float(frame["latency_ms"].max())
    )
    axes.grid()
    axes.set_xlabel("Experts kept per token and layer")
    axes.set_ylabel("Time per generated token (ms)")
    configuration_legend(figure, names)
    set_title(figure, findings.latency(table))
    return figure
