"""Connect analysis and reports to the end of a run; they are imported after the experiments."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bh_routing.cli.options import Surroundings

if TYPE_CHECKING:
    from bh_routing.analysis.results import Results
    from bh_routing.experiments.run import Hooks


def make_hooks(surroundings: Surroundings) -> Hooks:
    """Return the library's final steps, replaced by the caller's where given.

    Quality and speed-ups are added to the summary that `analyze` returns, a caller's own included.
    """
    from bh_routing.experiments.run import Hooks

    def load(folder: Path) -> Results:
        from bh_routing.analysis.results import load_results

        return load_results(folder)

    def analyze(results: Results) -> dict[str, Any]:
        from bh_routing.analysis.comparisons import analyze_results

        summary = (surroundings.analyze or analyze_results)(results.experiments)
        return _more_blocks(results, summary) | summary

    def visualize(results: Results, summary: dict[str, Any], folder: Path) -> Any:
        from bh_routing.report.facts import facts_of
        from bh_routing.report.figures import draw_plots

        if surroundings.visualize is not None:
            return surroundings.visualize(results.experiments, folder)
        return draw_plots(facts_of(results, summary))

    def report(results: Results, summary: dict[str, Any], folder: Path) -> Any:
        from bh_routing.report.facts import facts_of
        from bh_routing.report.markdown import write_report

        if surroundings.report is not None:
            return surroundings.report(results.experiments, summary, folder)
        return write_report(facts_of(results, summary))

    def page(results: Results, summary: dict[str, Any]) -> Any:
        from bh_routing.report.facts import facts_of
        from bh_routing.report.page.page import write_page_of

        return write_page_of(facts_of(results, summary))

    return Hooks(load=load, analyze=analyze, visualize=visualize, report=report, page=page)


def _more_blocks(results: Results, summary: dict[str, Any]) -> dict[str, Any]:
    from bh_routing.analysis.comparisons import choose_baseline
    from bh_routing.analysis.quality import analyze_quality
    from bh_routing.analysis.speed import speed_ups
    from bh_routing.results.files import to_strict

    blocks: dict[str, Any] = {}
    if results.quality and "quality" not in summary:
        blocks["quality"] = analyze_quality(results.quality)
    names = list(dict.fromkeys(results.experiments["config_name"]))
    if timed := speed_ups(results.timings, names, choose_baseline(results.experiments)):
        blocks["speed"] = to_strict({name: asdict(found) for name, found in timed.items()})
    return blocks


def conclude_sweep(folder: Path, seed: int) -> list[str]:
    """Make the tables, plots and report of a sweep; return a sentence if that fails."""
    from bh_routing.analysis.quality import QualityOptions
    from bh_routing.experiments.conclusion import guard
    from bh_routing.report import sweep

    problems: list[str] = []
    guard(
        "the conclusion", problems, lambda: sweep.conclude_sweep(folder, QualityOptions(seed=seed))
    )
    return problems
