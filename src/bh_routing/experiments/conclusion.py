"""Analysis, plots and reports at the end of a run; a failure here loses no results."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bh_routing.experiments.experiment import OUT_OF_MEMORY, is_out_of_memory
from bh_routing.experiments.run_log import FILE_ONLY
from bh_routing.results.files import render_json, write_atomically
from bh_routing.results.records import SUMMARY_JSON

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """Functions that analyse and report results; None skips a step.

    The folder is read once: each step receives the results that `load` returned.
    """

    load: Callable[[Path], Any] | None = None
    """Folder -> results."""
    analyze: Callable[[Any], dict[str, Any]] | None = None
    """Results -> content of analysis_summary.json."""
    visualize: Callable[[Any, dict[str, Any], Path], Any] | None = None
    """Results, summary and folder -> plots in the folder."""
    report: Callable[[Any, dict[str, Any], Path], Any] | None = None
    """Results, summary and folder -> REPORT.md in the folder."""
    page: Callable[[Any, dict[str, Any]], Any] | None = None
    """Results and summary -> report.html in the folder."""


def conclude(folder: Path, hooks: Hooks) -> list[str]:
    """Analyse, plot and report; return a sentence per failed step."""
    problems: list[str] = []
    if hooks.load is None:
        return problems
    load, analyze, visualize, report = hooks.load, hooks.analyze, hooks.visualize, hooks.report
    log.info("comparing, drawing the plots and writing the report")
    results = guard("reading the results", problems, lambda: load(folder))
    if results is None:
        return problems
    summary = None
    if analyze is not None:
        summary = guard("the analysis", problems, lambda: _keep(folder, analyze(results)))
    if visualize is not None and summary is not None:
        guard("drawing the plots", problems, lambda: visualize(results, summary, folder))
    if report is not None and summary is not None:
        guard("writing the report", problems, lambda: report(results, summary, folder))
    if (page := hooks.page) is not None and summary is not None:
        guard("writing the page", problems, lambda: page(results, summary))
    return problems


def guard(what: str, problems: list[str], step: Callable[[], ResultT]) -> ResultT | None:
    """Run one step; if it fails, append a sentence to `problems` and return None."""
    try:
        return step()
    except Exception as error:  # finished experiments are on disk: report the failure and go on
        log.exception("%s failed", what, extra=FILE_ONLY)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if is_out_of_memory(error):
            reason = OUT_OF_MEMORY
        problems.append(f"{what} failed ({reason}); every finished experiment is kept")
        return None


def _keep(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    write_atomically(folder / SUMMARY_JSON, render_json(summary))
    return summary
