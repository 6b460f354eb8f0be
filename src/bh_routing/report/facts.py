"""Data of a run's reports, read once and looked up by name.

The summary may come from a user's own `analyze_results`, so any part of it may be absent: missing
numbers are NaN and are shown as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bh_routing.analysis.comparisons import analyze_results, choose_baseline
from bh_routing.analysis.quality import analyze_quality
from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.results import Results, load_results
from bh_routing.analysis.speed import (
    SpeedUp,
    TextAgreement,
    read_timings,
    speed_ups,
    text_agreement,
)
from bh_routing.errors import InputError, ResultsError
from bh_routing.report.quality import QualityFindings, margin_of, quality_findings
from bh_routing.report.text import as_float, number
from bh_routing.results.files import find_json_object, planned_keys
from bh_routing.results.records import (
    ALTERNATIVES,
    RUN_JSON,
    STATUS_OK,
    SUMMARY_JSON,
    TIMINGS,
    QualityRecord,
)
from bh_routing.stats.paired import EXACT_PAIRS, MeanInterval, mean_interval

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
MEASURES: Final = (
    *METRICS, "std_experts_per_token", "min_experts", "max_experts", "decode_time_sec",
    "num_output_tokens", f"{BALANCE}_noise",
)  # fmt: skip
CATEGORY_LIMIT: Final = 8
EXAMPLES: Final = 4


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Contents of a run's folder and its summary, with the lookups that reports share."""

    results: Results
    summary: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Raise InputError if a needed column is missing."""
        needed = ("config_name", "prompt_text", EXPERTS)
        if missing := [c for c in needed if c not in self.results.experiments.columns]:
            raise InputError(
                f"the results lack the column {', '.join(missing)}; "
                "read them with load_results or from bh_routing_results.csv"
            )

    @cached_property
    def _experiments(self) -> pd.DataFrame:
        """All experiments, with numeric columns; missing columns become NaN."""
        rows = self.results.experiments.copy()
        for column, missing in (("prompt_category", ""), ("status", STATUS_OK), ("error", "")):
            text = rows[column] if column in rows.columns else pd.Series(missing, index=rows.index)
            rows[column] = text.fillna(missing).astype(str)
        for column in ("config_name", "prompt_text"):
            rows[column] = rows[column].astype(str)
        for column in MEASURES:
            known = rows[column] if column in rows.columns else math.nan
            numbers = pd.to_numeric(pd.Series(known, index=rows.index), errors="coerce")
            rows[column] = numbers.astype(np.float64).replace([np.inf, -np.inf], np.nan)
        noise = rows[f"{BALANCE}_noise"]
        rows["load_over_noise"] = rows[BALANCE] / noise.where(noise > 0)
        return rows

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Finished experiments, in the order of the results."""
        rows = self._experiments
        return rows[rows["status"] == STATUS_OK].reset_index(drop=True)

    @cached_property
    def failures(self) -> list[tuple[str, str, str]]:
        """Configuration, prompt and reason of each failed experiment."""
        failed = self._experiments[self._experiments["status"] != STATUS_OK]
        return list(failed[["config_name", "prompt_text", "error"]].itertuples(False, None))

    @property
    def run(self) -> Mapping[str, Any]:
        """Content of run.json; empty if there is none."""
        return self.results.run

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.results.folder

    @cached_property
    def names(self) -> list[str]:
        """Configurations with finished experiments."""
        return [str(name) for name in self.frame["config_name"].drop_duplicates()]

    @cached_property
    def baseline(self) -> str | None:
        """Name of the baseline configuration."""
        named = self.summary.get("baseline")
        return str(named) if named in self.names else choose_baseline(self.frame)

    @property
    def others(self) -> list[str]:
        """All configurations but the baseline."""
        return [name for name in self.names if name != self.baseline]

    @cached_property
    def groups(self) -> list[str]:
        """Categories of prompts, in the order of the results."""
        return [str(category) for category in self.frame["prompt_category"].drop_duplicates()]

    @cached_property
    def speed_ups(self) -> Mapping[str, SpeedUp]:
        """Speed-ups from interleaved rounds; empty if there were none."""
        return speed_ups(self.results.timings, self.names, self.baseline)

    @cached_property
    def quality(self) -> QualityFindings:
        """Findings of the quality phase; no rows if it was skipped."""
        return quality_findings(self.summary)

    @property
    def alternatives(self) -> Mapping[str, Any]:
        """Rules scored for comparison with BH configurations, in run.json; empty in older runs."""
        return child(self.run, ALTERNATIVES)

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
        return int(self.frame["prompt_text"].nunique())

    @property
    def num_experiments(self) -> int:
        """Finished and failed experiments."""
        return len(self.results.experiments)

    @cached_property
    def agreement(self) -> dict[str, TextAgreement]:
        """Agreement of the generated tokens with the baseline's, by configuration."""
        if self.baseline is None:
            return {}
        here = set(zip(self.frame["config_name"], self.frame["prompt_text"], strict=True))
        kept = {key: detail for key, detail in self.results.details.items() if key in here}
        return {n: f for n, f in text_agreement(kept, self.baseline).items() if f.prompts}

    @cached_property
    def time_changes(self) -> dict[str, MeanInterval]:
        """Mean relative changes of time against the baseline, with their intervals.

        From interleaved rounds; for older runs, from one pass over the prompts, paired by prompt.
        """
        if self.speed_ups:
            found = {n: self.speed_ups[n].change for n in self.others if n in self.speed_ups}
            return {name: change for name, change in found.items() if math.isfinite(change.low)}
        changes = {}
        for name in self.others if self.baseline is not None else []:
            own_n, baseline_n = self.paired(name, SECONDS)
            positive = baseline_n > 0
            change = mean_interval(own_n[positive] / baseline_n[positive] - 1.0)
            if math.isfinite(change.mean):
                changes[name] = change
        return changes

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
    def constant(self) -> list[str]:
        """Rules other than static top-k with a constant number of experts within each prompt."""
        spreads = {n: self.values(n, "std_experts_per_token") for n in self.others}
        static = {n for n in self.others if self.config(n).get("method") == STATIC}
        return [n for n, s_n in spreads.items() if n not in static and len(s_n) and not s_n.any()]

    @property
    def categories(self) -> dict[str, tuple[int, dict[str, float]]]:
        """Category -> its number of prompts and the mean experts per configuration.

        Empty if no category has a name. The first eight; the others are in the CSV.
        """
        found: dict[str, tuple[int, dict[str, float]]] = {}
        for group in self.groups[:CATEGORY_LIMIT] if self.groups != [""] else []:
            part = self.frame[self.frame["prompt_category"] == group]
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
        frame = self.frame
        if "generated_text" not in frame.columns:
            return []
        found = []
        for prompt in frame.drop_duplicates("prompt_category").head(EXAMPLES)["prompt_text"]:
            same = frame[frame["prompt_text"] == prompt].drop_duplicates("config_name")
            texts = zip(same["config_name"], same["generated_text"], strict=True)
            found.append((str(prompt), list(texts)[:CATEGORY_LIMIT]))
        return found

    def mean_of(self, name: str, metric: str = EXPERTS) -> float:
        """Return the mean of a column over a configuration's finished experiments; NaN if none."""
        values_n = self.values(name, metric)
        return float(values_n.mean()) if len(values_n) else math.nan

    def values(self, name: str, column: str) -> NDArray[np.float64]:
        """Return the finite values of one configuration."""
        mine = self.frame.loc[self.frame["config_name"] == name, column]
        return mine.dropna().to_numpy(dtype=np.float64)

    def paired(self, name: str, column: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the values of a configuration and the baseline on prompts that both finished."""
        sides = (self.frame[self.frame["config_name"] == n] for n in (name, self.baseline))
        means = [side.groupby("prompt_text", sort=False)[column].mean() for side in sides]
        pairs = pd.concat(means, axis=1, join="inner", keys=["own", "baseline"]).dropna()
        return pairs["own"].to_numpy(np.float64), pairs["baseline"].to_numpy(np.float64)

    def saved(self, name: str) -> float:
        """Return the fraction of the baseline's experts that a configuration saves."""
        return self.compared(name, EXPERTS, "reduction")

    def range_of_a_unit(self, name: str) -> str:
        """Format the minimum and maximum experts per token and layer."""
        low_n, high_n = (self.values(name, f"{end}_experts") for end in ("min", "max"))
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
    Raises:
        InputError: a needed column is missing.
    """
    known = results.summary or analyze_results(results.experiments) if summary is None else summary
    return Facts(results=results, summary=_with_quality(known, results.quality))


def read_facts(experiments: pd.DataFrame, summary: Mapping[str, Any] | None, folder: Path) -> Facts:
    """Gather the same from a caller's table and the readable part of the folder.

    Args:
        experiments: rows as in `bh_routing_results.csv`.
        summary: return value of `analyze_results`; None: that of the folder, which may lack it.
        folder: results folder.
    Raises:
        InputError: a needed column is missing.
        ResultsError: timings.csv is damaged.
    """
    try:
        stored = replace(load_results(folder), experiments=experiments)
    except ResultsError:  # the table is complete: few sections need the folder
        run = find_json_object(folder / RUN_JSON) or {}
        stored = Results(
            folder=folder,
            experiments=experiments,
            run=run,
            summary=find_json_object(folder / SUMMARY_JSON) if summary is None else None,
            timings=read_timings(folder / TIMINGS, planned_keys(run)),
        )
    return facts_of(stored, (stored.summary or {}) if summary is None else summary)


def _with_quality(
    summary: Mapping[str, Any], records: tuple[QualityRecord, ...]
) -> Mapping[str, Any]:
    """Add the quality block to a summary that lacks it, such as a user's own.

    A block of an older run doesn't mark the static top-k rules, so it is recomputed.
    """
    rows = child(summary, "quality").get("rules") or []
    is_whole = summary.get("quality") is not None and all("rule" in row for row in rows)
    return summary if is_whole or not records else {**summary, "quality": analyze_quality(records)}
