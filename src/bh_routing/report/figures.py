"""Draw all plots of a run into `plots/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from bh_routing.report.charts import draw_charts
from bh_routing.report.charts.style import look, new_figure, save, set_title
from bh_routing.report.facts import Facts, read_facts
from bh_routing.results.files import find_json_object
from bh_routing.results.records import PLOTS, SUMMARY_JSON

QUALITY_PLOT: Final = "quality_vs_experts.png"
EXPERTS_PLOT: Final = "avg_experts_comparison.png"
TIME_PLOT: Final = "inference_time_comparison.png"
BALANCE_PLOT: Final = "expert_utilization_cv.png"
CATEGORY_PLOT: Final = "experts_by_category.png"
LATENCY_PLOT: Final = "experts_vs_latency.png"
STANDARD: Final = (EXPERTS_PLOT, TIME_PLOT, BALANCE_PLOT, CATEGORY_PLOT, LATENCY_PLOT)
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
    folder = Path(output_dir)
    given = find_json_object(folder / SUMMARY_JSON) or {} if summary is None else summary
    return draw_plots(read_facts(results, given, folder), kind)


def draw_plots(facts: Facts, kind: str = "png") -> list[Path]:
    """Draw the plots of a run into its folder."""
    pictures: dict[str, Figure] = {}
    if facts.names:
        for charts in draw_charts(facts).values():
            pictures |= {name: chart.picture() for name, chart in charts.items()}
    else:
        pictures = {Path(name).stem: _nothing(facts) for name in STANDARD}
    return [
        save(figure, facts.folder / PLOTS / f"{name}.{kind}") for name, figure in pictures.items()
    ]


def _nothing(facts: Facts) -> Figure:
    with look():
        figure, axes = new_figure(2.4)
        set_title(figure, "Nothing to draw")
        axes.set_axis_off()
        axes.text(0.0, 0.6, f"No finished experiment ({facts.table.num_failed} failed).")
    return figure
