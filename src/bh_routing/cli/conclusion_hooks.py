"""Wire the reading tower into the end of a run; it loads when the experiments are done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bh_routing.cli.surroundings import Surroundings

if TYPE_CHECKING:
    from bh_routing.analysis.results import Results
    from bh_routing.experiments.run import Hooks


def make_hooks(surroundings: Surroundings) -> Hooks:
    """Return the library's last steps, or the caller's in their place.

    Quality, speed-ups and agreement of texts join whatever summary `analyze` returns, so that a
    caller's own analysis does not lose them.
    """
    from bh_routing.experiments.run import Hooks

    loaded: list[Results] = []

    def load(folder: Path) -> Any:
        from bh_routing.analysis.results import load_results

        loaded[:] = [load_results(folder)]
        return loaded[0].experiments

    def analyze(experiments: Any) -> dict[str, Any]:
        from bh_routing.analysis.comparisons import analyze_results

        summary = (surroundings.analyze or analyze_results)(experiments)
        return _more_blocks(loaded[0], summary) | summary

    def visualize(experiments: Any, folder: Path) -> Any:
        from bh_routing.report.figures import create_visualizations

        return (surroundings.visualize or create_visualizations)(experiments, folder)

    def report(experiments: Any, summary: dict[str, Any], folder: Path) -> Any:
        from bh_routing.report.markdown import generate_markdown_report

        return (surroundings.report or generate_markdown_report)(experiments, summary, folder)

    def page(folder: Path) -> Any:
        from bh_routing.report.page.page import write_page

        return write_page(folder)

    return Hooks(load=load, analyze=analyze, visualize=visualize, report=report, page=page)


def _more_blocks(results: Results, summary: dict[str, Any]) -> dict[str, Any]:
    from bh_routing.analysis.comparisons import choose_baseline
    from bh_routing.analysis.quality import analyze_quality
    from bh_routing.analysis.speed import speed_ups
    from bh_routing.analysis.text_agreement import text_agreement
    from bh_routing.results.strict_json import to_strict

    blocks: dict[str, Any] = {}
    if results.quality and "quality" not in summary:
        blocks["quality"] = analyze_quality(results.quality)
    names = list(dict.fromkeys(results.experiments["config_name"]))
    baseline = choose_baseline(results.experiments)
    if timed := speed_ups(results.timings, names, baseline):
        blocks["speed"] = to_strict({name: asdict(found) for name, found in timed.items()})
    if baseline is not None:
        agreement = text_agreement(results.details, baseline)
        blocks["text_agreement"] = to_strict({name: asdict(a) for name, a in agreement.items()})
    return blocks


def conclude_sweep(folder: Path, seed: int) -> list[str]:
    """Make the tables, pictures and report of a sweep; return a sentence if that failed."""
    from bh_routing.analysis.quality import QualityOptions
    from bh_routing.experiments.conclusion import guard
    from bh_routing.report import sweep

    problems: list[str] = []
    guard(
        "the conclusion", problems, lambda: sweep.conclude_sweep(folder, QualityOptions(seed=seed))
    )
    return problems
