"""Data of a run's reports, read once and looked up by name.

The summary may come from a user's own `analyze_results`, so any part of it may be absent: missing
numbers are NaN and are shown as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import pandas as pd

from bh_routing.analysis.comparisons import analyze_results
from bh_routing.analysis.quality import analyze_quality
from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.results import Results, load_results
from bh_routing.analysis.speed import TextAgreement, read_timings, text_agreement
from bh_routing.errors import ResultsError
from bh_routing.report import findings
from bh_routing.report.quality import (
    QualityFindings,
    Recommendation,
    margin_of,
    quality_findings,
    recommend,
)
from bh_routing.report.table import Experiments, experiments_of
from bh_routing.report.text import as_float, number
from bh_routing.results.files import find_json_object
from bh_routing.results.records import (
    ALTERNATIVES,
    RUN_JSON,
    TIMINGS,
    ExperimentDetail,
    QualityRecord,
)
from bh_routing.stats.paired import EXACT_PAIRS, MeanInterval

EXPERTS: Final = "avg_experts_per_token"
SECONDS: Final = "inference_time_sec"
SPEED: Final = "tokens_per_sec"
BALANCE: Final = "expert_utilization_cv"
METRICS: Final = {
    EXPERTS: ("Experts kept per token and layer", 2),
    SECONDS: ("Generation time per prompt, seconds", 3),
    SPEED: ("Speed, generated tokens per second", 2),
    BALANCE: ("Coefficient of variation of expert load", 2),
}
"""Metric -> title and decimals of its table of tests."""
CATEGORY_LIMIT: Final = 8
EXAMPLES: Final = 4

Details = Mapping[tuple[str, str], ExperimentDetail]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Experiments, statistics and provenance of one run."""

    table: Experiments
    summary: Mapping[str, Any]
    run: Mapping[str, Any]
    """Content of run.json; empty if there is none."""
    folder: Path
    details: Details = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Configurations with finished experiments."""
        return self.table.names

    @property
    def baseline(self) -> str | None:
        """Name of the baseline configuration."""
        named = self.summary.get("baseline")
        return str(named) if named in self.table.names else self.table.baseline

    @property
    def others(self) -> list[str]:
        """All configurations but the baseline."""
        return [name for name in self.names if name != self.baseline]

    @cached_property
    def quality(self) -> QualityFindings:
        """Findings of the quality phase; no rows if it was skipped."""
        return quality_findings(self.summary)

    @property
    def alternatives(self) -> Mapping[str, Any]:
        """Rules scored where BH configurations lose, in run.json; empty in older runs."""
        return child(self.run, ALTERNATIVES)

    @property
    def recommendation(self) -> Recommendation | None:
        """The rule to use; None if none was compared with static top-k."""
        return recommend(self.quality, child(self.alternatives, "commands"))

    @property
    def margin(self) -> float:
        """Non-inferiority margin, as ΔNLL in nats per token."""
        return margin_of(self.summary)

    @property
    def model(self) -> Mapping[str, Any]:
        """The model's entry in run.json."""
        return child(self.run, "model")

    @property
    def spec(self) -> Mapping[str, Any]:
        """The resolved spec in run.json."""
        return child(self.run, "spec")

    @property
    def num_prompts(self) -> int:
        """Distinct prompts among the finished experiments."""
        return int(self.table.frame["prompt_text"].nunique())

    @property
    def num_experiments(self) -> int:
        """Finished and failed experiments."""
        return len(self.table.frame) + len(self.table.failures)

    @cached_property
    def agreement(self) -> dict[str, TextAgreement]:
        """Agreement of the generated tokens with the baseline's, by configuration."""
        if self.baseline is None:
            return {}
        frame = self.table.frame
        here = set(zip(frame["config_name"], frame["prompt_text"], strict=True))
        kept = {key: detail for key, detail in self.details.items() if key in here}
        return {n: f for n, f in text_agreement(kept, self.baseline).items() if f.prompts}

    @cached_property
    def time_changes(self) -> dict[str, MeanInterval]:
        """Relative changes of time against the baseline."""
        return findings.time_changes(self.table)

    @property
    def rounds(self) -> str:
        """Number of interleaved timing rounds, for display."""
        return findings.span_of(found.whole.n for found in self.table.speed_ups.values())

    @property
    def extreme_times(self) -> list[tuple[str, MeanInterval]]:
        """The fastest and the slowest configuration."""
        return _extremes(self.time_changes, lambda change: change.mean)

    @property
    def extreme_savings(self) -> list[tuple[str, float]]:
        """The configurations that save the smallest and the largest fraction of experts."""
        saved = {name: self.saved(name) for name in self.others}
        known = {name: value for name, value in saved.items() if math.isfinite(value)}
        return _extremes(known, lambda value: value)

    @property
    def expert_sides(self) -> dict[str, list[list[str]]]:
        """Side -> configurations, by experts kept."""
        return findings.grouped(findings.expert_sides(self.table))

    @property
    def balance_sides(self) -> dict[str, list[list[str]]]:
        """Side -> configurations, by load relative to noise; those without a test are left out."""
        sides = findings.balance_sides(self.table)
        return findings.grouped({name: s for name, s in sides.items() if s != "unknown"})

    @property
    def time_sides(self) -> dict[str, list[list[str]]]:
        """Faster, slower with fewer experts, slower, undecided and unknown configurations."""
        return findings.time_sides(self.table)

    @property
    def constant(self) -> list[str]:
        """Rules other than static top-k with a constant number of experts within each prompt."""
        spreads = {n: self.table.values(n, "std_experts_per_token") for n in self.others}
        static = {n for n in self.others if self.config(n).get("method") == STATIC}
        return [n for n, s_n in spreads.items() if n not in static and len(s_n) and not s_n.any()]

    @property
    def categories(self) -> dict[str, tuple[int, dict[str, float]]]:
        """Category -> its number of prompts and the mean experts per configuration.

        Empty if no category has a name. The first eight; the others are in the CSV.
        """
        groups, frame = self.table.categories, self.table.frame
        found: dict[str, tuple[int, dict[str, float]]] = {}
        for group in groups[:CATEGORY_LIMIT] if groups != [""] else []:
            part = frame[frame["prompt_category"] == group]
            means = part.groupby("config_name")[EXPERTS].mean()
            found[group] = (
                int(part["prompt_text"].nunique()),
                {str(n): float(mean) for n, mean in means.items()},
            )
        return found

    @property
    def exact_pairs(self) -> int:
        """Number of pairs in the exact signed-rank tests; 0 if too many for exact tests."""
        pairs = [as_float(self.compare(name, EXPERTS).get("n")) for name in self.others]
        most = max((n for n in pairs if math.isfinite(n)), default=0.0)
        return int(most) if most <= EXACT_PAIRS else 0

    @property
    def examples(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """One prompt from each of several categories, with its continuations."""
        frame = self.table.frame
        if "generated_text" not in frame.columns:
            return []
        found = []
        for prompt in frame.drop_duplicates("prompt_category").head(EXAMPLES)["prompt_text"]:
            same = frame[frame["prompt_text"] == prompt].drop_duplicates("config_name")
            texts = zip(same["config_name"], same["generated_text"], strict=True)
            found.append((str(prompt), list(texts)[:CATEGORY_LIMIT]))
        return found

    def mean(self, name: str, metric: str = EXPERTS) -> float:
        """Return the mean of a column over a configuration's finished experiments."""
        return self.table.mean(name, metric)

    def saved(self, name: str) -> float:
        """Return the fraction of the baseline's experts that a configuration saves."""
        return self.compared(name, EXPERTS, "reduction")

    def range_of_a_unit(self, name: str) -> str:
        """Format the minimum and maximum experts per token and layer."""
        low_n, high_n = (self.table.values(name, f"{end}_experts") for end in ("min", "max"))
        if not (len(low_n) and len(high_n)):
            return number(None)
        return f"{number(low_n.min(), 0)} to {number(high_n.max(), 0)}"

    def describe(self, name: str, metric: str) -> Mapping[str, Any]:
        """Return {n, mean, sd, low, high, min, max}; empty if the summary lacks it."""
        return child(self.summary, "configurations", name, "metrics", metric)

    def compare(self, name: str, metric: str) -> Mapping[str, Any]:
        """Return the comparison with the baseline; empty if the summary lacks it."""
        return child(self.summary, "comparisons", name, metric)

    def compared(self, name: str, metric: str, field: str) -> float:
        """Return one number of that comparison; NaN if missing."""
        return as_float(self.compare(name, metric).get(field))

    def config(self, name: str) -> Mapping[str, Any]:
        """Return the configuration's fields in run.json."""
        return child(self.spec, "configs", name)


def _extremes(values: Mapping[str, Any], key: Any) -> list[tuple[str, Any]]:
    """Return the entries with the lowest and the highest value; one entry if they coincide."""
    if not values:
        return []
    ends = (pick(values, key=lambda name: key(values[name])) for pick in (min, max))
    return [(name, values[name]) for name in dict.fromkeys(ends)]


def child(value: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """Follow a path of keys; an empty mapping if it doesn't exist."""
    for key in path:
        below = value.get(key)
        value = below if isinstance(below, Mapping) else {}
    return value


def facts_of(results: Results, summary: Mapping[str, Any] | None = None) -> Facts:
    """Gather the data of a report.

    Args:
        results: contents of a results folder.
        summary: return value of `analyze_results`; None: that of the folder, or a new one.
    """
    known = results.summary or analyze_results(results.experiments) if summary is None else summary
    return Facts(
        table=experiments_of(results.experiments, results.timings),
        summary=_with_quality(known, results.quality),
        run=results.run,
        folder=results.folder,
        details=results.details,
    )


def read_facts(experiments: pd.DataFrame, summary: Mapping[str, Any], folder: Path) -> Facts:
    """Gather the same from a caller's table and the readable part of the folder.

    Raises:
        InputError: a needed column is missing.
        ResultsError: timings.csv is damaged.
    """
    try:
        stored = load_results(folder)
    except ResultsError:  # the table is complete: few sections need the folder
        table = experiments_of(experiments, read_timings(folder / TIMINGS))
        run = find_json_object(folder / RUN_JSON) or {}
        return Facts(table=table, summary=summary, run=run, folder=folder)
    return facts_of(replace(stored, experiments=experiments), summary)


def _with_quality(
    summary: Mapping[str, Any], records: tuple[QualityRecord, ...]
) -> Mapping[str, Any]:
    """Add the quality block to a summary that lacks it, such as a user's own.

    A block of an older run doesn't mark the static top-k rules, so it is recomputed.
    """
    rows = child(summary, "quality").get("rules") or []
    is_whole = summary.get("quality") is not None and all("rule" in row for row in rows)
    return summary if is_whole or not records else {**summary, "quality": analyze_quality(records)}
