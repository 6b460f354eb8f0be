"""The pictures of a run: `create_visualizations` draws them all into `plots/`.

Every title states what the numbers show. Points are prompts, bars are means over prompts; of time
they are rounds, where all configurations were timed side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from bh_routing.records import PLOTS, SUMMARY_JSON
from bh_routing.report import findings
from bh_routing.report.bars import BarPlot, draw_bars
from bh_routing.report.quality import margin_of, quality_rows, with_quality
from bh_routing.report.quality_plot import QUALITY_PLOT, draw_quality
from bh_routing.report.scatter import draw_categories, draw_experts_vs_latency
from bh_routing.report.speed_plots import (
    draw_experts_vs_speed,
    draw_relative_times,
    timed_with_baseline,
)
from bh_routing.report.style import look, new_figure, save, set_title
from bh_routing.report.table import Experiments, experiments_of
from bh_routing.results.strict_json import find_json_object

EXPERTS_PLOT: Final = "avg_experts_comparison.png"
TIME_PLOT: Final = "inference_time_comparison.png"
BALANCE_PLOT: Final = "expert_utilization_cv.png"
CATEGORY_PLOT: Final = "experts_by_category.png"
LATENCY_PLOT: Final = "experts_vs_latency.png"


def create_visualizations(
    results: pd.DataFrame,
    output_dir: str | Path,
    summary: dict[str, Any] | None = None,
    kind: str = "png",
) -> list[Path]:
    """Draw the plots of a run into `output_dir/plots`.

    Args:
        results: rows as in `bh_routing_results.csv`; failed rows are left out.
        output_dir: the results folder.
        summary: what `analyze_results` returned, for the quality plot; by default the summary
            that lies in the folder.
        kind: png, pdf or svg.
    Returns:
        Paths of the plots, in the order of the report.
    Raises:
        InputError: a needed column is missing.
    """
    folder = Path(output_dir)
    given = find_json_object(folder / SUMMARY_JSON) or {} if summary is None else summary
    known = with_quality(given, folder)
    table = experiments_of(results, folder)
    is_timed = bool(timed_with_baseline(table))
    plots: dict[str, Callable[[], Figure]] = {
        EXPERTS_PLOT: lambda: _experts(table),
        TIME_PLOT: lambda: draw_relative_times(table) if is_timed else _time(table),
        BALANCE_PLOT: lambda: _balance(table),
        CATEGORY_PLOT: lambda: draw_categories(table),
        LATENCY_PLOT: lambda: (
            draw_experts_vs_speed(table) if is_timed else draw_experts_vs_latency(table)
        ),
    }
    quality = quality_rows(known)
    if quality:
        plots = {QUALITY_PLOT: lambda: draw_quality(quality, margin_of(known))} | plots
    paths = []
    for name, draw in plots.items():
        with look():
            figure = draw() if table.names else _nothing(table)
        paths.append(save(figure, (folder / PLOTS / name).with_suffix(f".{kind}")))
    return paths


def _experts(table: Experiments) -> Figure:
    return draw_bars(
        table,
        BarPlot(
            column="avg_experts_per_token",
            label="Experts kept per token and layer",
            title=findings.experts(table),
        ),
    )


def _time(table: Experiments) -> Figure:
    return draw_bars(
        table,
        BarPlot(
            column="inference_time_sec",
            label="Generation time per prompt (seconds)",
            title=findings.time(table),
        ),
    )


def _balance(table: Experiments) -> Figure:
    return draw_bars(
        table,
        BarPlot(
            column="expert_utilization_cv",
            label="Coefficient of variation of expert load (no unit)",
            title=findings.balance(table),
            reference="expert_utilization_cv_noise",
            reference_label="sampling noise alone",
        ),
    )


def _nothing(table: Experiments) -> Figure:
    figure, axes = new_figure(2.4)
    set_title(figure, "Nothing to draw")
    axes.set_axis_off()
    axes.text(0.0, 0.6, f"No finished experiment ({table.num_failed} failed).")
    return figure
