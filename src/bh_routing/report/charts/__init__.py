"""Charts of the package, each defined once for PNG, PDF, SVG and report.html."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from bh_routing.report.charts import experiments, layers, quality
from bh_routing.report.charts.chart import Chart, draw_charts
from bh_routing.report.charts.style import look, new_figure, save, set_title
from bh_routing.report.facts import Facts, read_facts
from bh_routing.results.records import PLOTS

__all__ = [
    "Chart",
    "create_visualizations",
    "draw_charts",
    "draw_plots",
    "experiments",  # and the next two: imported for the charts that they register
    "layers",
    "quality",
]

STANDARD: Final = (
    "avg_experts_comparison",
    "inference_time_comparison",
    "expert_utilization_cv",
    "experts_by_category",
    "experts_vs_latency",
)
"""Plots that every run has, even without a finished experiment."""


def create_visualizations(
    results: pd.DataFrame,
    output_dir: str | Path,
    summary: dict[str, Any] | None = None,
    kind: str = "png",
) -> list[Path]:
    """Draw the plots of a run into `output_dir/plots`.

    Args:
        results: rows as in `bh_routing_results.csv`; failed rows are left out.
        output_dir: results folder.
        summary: return value of `analyze_results`, for the quality plot; by default the summary in
            the folder.
        kind: png, pdf or svg.
    Returns:
        Paths of the plots, in the order of the report.
    Raises:
        InputError: a needed column is missing.
    """
    return draw_plots(read_facts(results, summary, Path(output_dir)), kind)


def draw_plots(facts: Facts, kind: str = "png") -> list[Path]:
    """Draw the plots of a run into its folder."""
    pictures: dict[str, Figure] = {
        name: chart.picture()
        for charts in draw_charts(facts).values()
        for name, chart in charts.items()
    }
    if not facts.names:
        pictures = dict.fromkeys(STANDARD, _nothing(facts))
    return [
        save(figure, facts.folder / PLOTS / f"{name}.{kind}") for name, figure in pictures.items()
    ]


def _nothing(facts: Facts) -> Figure:
    with look():
        figure, axes = new_figure(2.4)
        set_title(figure, "Nothing to draw")
        axes.set_axis_off()
        axes.text(0.0, 0.6, f"No finished experiment ({len(facts.failures)} failed).")
    return figure
