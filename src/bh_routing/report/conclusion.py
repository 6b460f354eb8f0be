"""The end of a run: analysis, plots and reports, each step under the run's care."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from bh_routing.analysis.comparisons import analyze_results, summarize
from bh_routing.analysis.results import Results, load_results
from bh_routing.report.charts import draw_plots
from bh_routing.report.facts import facts_of
from bh_routing.report.markdown import write_report
from bh_routing.report.page import write_page_of
from bh_routing.results.files import render_json, write_atomically
from bh_routing.results.records import SUMMARY_JSON


def conclude_run(
    folder: Path,
    attempt: Callable[[str, Callable[[], Any]], Any],
    *,
    analyze: Callable[[pd.DataFrame], dict[str, Any]] | None = None,
    visualize: Callable[[pd.DataFrame, Path], Any] | None = None,
    report: Callable[[pd.DataFrame, dict[str, Any], Path], Any] | None = None,
) -> Results | None:
    """Write analysis_summary.json, the plots, REPORT.md and report.html; read the folder once.

    Args:
        folder: the folder of the run.
        attempt: runs a named step and returns its result, or None if it failed.
        analyze, visualize, report: functions in place of the library's; quality and speed-ups are
            added to the summary that `analyze` returns.
    Returns:
        The folder's contents with the new summary; None if the reading or the analysis failed.
    """
    results: Results | None = attempt("reading the results", partial(load_results, folder))
    if results is None:
        return None

    def make_summary() -> dict[str, Any]:
        summary = summarize(results, analyze or analyze_results)
        write_atomically(folder / SUMMARY_JSON, render_json(summary))
        return summary

    summary = attempt("the analysis", make_summary)
    if summary is None:
        return None
    table = results.experiments
    facts = cache(lambda: facts_of(results, summary))

    draw = partial(visualize, table, folder) if visualize else lambda: draw_plots(facts())
    write = partial(report, table, summary, folder) if report else lambda: write_report(facts())
    attempt("drawing the plots", draw)
    attempt("writing the report", write)
    attempt("writing the HTML report", lambda: write_page_of(facts()))
    return replace(results, summary=summary)
