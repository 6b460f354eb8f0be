"""Compare every configuration with the Top-K baseline, paired over prompts.

`analyze_results` returns the content of `analysis_summary.json`:

    schema_version, baseline, confidence, significance_level, correction, definitions, notes
    rows            {total, ok, failed}
    prompts         number of distinct prompts among the rows that are ok
    configurations  {name: {rows, failed, is_baseline, metrics: {metric: DESCRIPTION},
                            categories: {category: {metric: DESCRIPTION + reduction}}}}
    comparisons     {name: {metric: COMPARISON}}      every configuration but the baseline

    DESCRIPTION     {n, mean, sd, low, high, min, max}
    COMPARISON      {n, left_out, mean_difference, sd_difference, low, high, t, df, p, p_corrected,
                     cohens_d, wilcoxon_p, wilcoxon_method, wilcoxon_floor, reduction,
                     reduction_low, reduction_high, reduction_of_means, significant, note}

An unknown number is null, and the note of its comparison gives the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bh_routing.analysis.quality import analyze_quality
from bh_routing.analysis.results import Results
from bh_routing.analysis.speed import speed_ups
from bh_routing.errors import InputError, unknown_name
from bh_routing.results.files import to_strict
from bh_routing.results.records import BASELINE, SCHEMA_VERSION, STATUS_OK
from bh_routing.stats.paired import MeanInterval, holm, mean_interval, paired_difference

METRICS: Final = (
    "avg_experts_per_token",
    "inference_time_sec",
    "tokens_per_sec",
    "expert_utilization_cv",
)
SIGNIFICANCE_LEVEL: Final = 0.05
CONFIDENCE: Final = 0.95

DEFINITIONS: Final = {
    "mean_difference": "Mean over prompts of (configuration - baseline).",
    "low": "Lower end of the 95 % t interval of the mean difference (or of the mean).",
    "high": "Upper end of that interval.",
    "p": "Two-sided paired t test, uncorrected.",
    "p_corrected": "p after Holm's correction over the configurations, metric by metric.",
    "cohens_d": "d_z: mean difference over the standard deviation of the differences.",
    "wilcoxon_p": "Two-sided Wilcoxon signed-rank test, uncorrected.",
    "wilcoxon_floor": "The smallest p that an exact signed-rank test can reach with this many "
    "prompts: 2 / 2^n over the n prompts whose difference isn't 0.",
    "reduction": "Mean over prompts of 1 - configuration / baseline, as a fraction (0.25 is 25 %; "
    "negative is an increase). Each prompt counts the same.",
    "reduction_of_means": "1 - mean of the configuration / mean of the baseline, over the same "
    "prompts: long prompts count more. It need not equal `reduction`.",
    "significant": f"p_corrected < {SIGNIFICANCE_LEVEL}; false where there is no p.",
    "scope": "The p-values speak of these prompts, not of text in general.",
}


def analyze_results(results: pd.DataFrame, baseline: str | None = None) -> dict[str, Any]:
    """Compare every configuration with the baseline, paired over prompts.

    Rows are paired by `prompt_text`. Pairs with a failed row are left out and counted. Repeated
    runs of a prompt under one configuration are averaged.

    Args:
        results: rows as in `bh_routing_results.csv`; needs config_name, prompt_text and at least
            one of METRICS; prompt_category and status are used if present.
        baseline: name of the reference; by default the one that `load_results` read from run.json
            (`results.attrs["baseline"]`), else the first whose name begins with top_k or topk.
    Returns:
        The dict described at the top of this file, ready for strict JSON (null, never NaN).
    Raises:
        InputError: a required column is missing, or the baseline isn't among the results.
    Source: paired t and Wilcoxon as in scipy; Holm (1979); d_z in Lakens (2013).
    """
    rows, metrics = _checked(results)
    names = [str(name) for name in rows["config_name"].drop_duplicates()]
    reference = choose_baseline(rows, baseline)
    ok = rows[rows["status"] == STATUS_OK]
    notes = [] if reference else ["No Top-K configuration in the results: nothing to compare with."]
    by_prompt = _by_prompt(ok, metrics)
    if by_prompt.attrs["repeats"]:
        notes.append(f"Repeated rows averaged into their prompt: {by_prompt.attrs['repeats']}.")
    failed = len(rows) - len(ok)
    if failed:
        notes.append(f"Failed rows left out: {failed}.")
    return _strict_dict(
        {
            "schema_version": SCHEMA_VERSION,
            "baseline": reference,
            "confidence": CONFIDENCE,
            "significance_level": SIGNIFICANCE_LEVEL,
            "correction": "Holm over configurations, metric by metric",
            "definitions": DEFINITIONS,
            "notes": notes,
            "rows": {"total": len(rows), "ok": len(ok), "failed": failed},
            "prompts": int(ok["prompt_text"].nunique()),
            "configurations": {
                name: _configuration(rows, by_prompt, name, reference, metrics) for name in names
            },
            "comparisons": _comparisons(by_prompt, names, reference, metrics),
        }
    )


def summarize(
    results: Results, analyze: Callable[[pd.DataFrame], dict[str, Any]] = analyze_results
) -> dict[str, Any]:
    """Return the summary of a run: that of its experiments, its quality and its speed-ups.

    Args:
        results: contents of the run's folder.
        analyze: table of experiments -> summary; its own `quality` and `speed` take precedence.
    """
    summary = analyze(results.experiments)
    more: dict[str, Any] = {}
    if results.quality and "quality" not in summary:
        more["quality"] = analyze_quality(results.quality)
    names = list(dict.fromkeys(results.experiments["config_name"]))
    if timed := speed_ups(results.timings, names, choose_baseline(results.experiments)):
        more["speed"] = to_strict({name: asdict(found) for name, found in timed.items()})
    return more | summary


def choose_baseline(results: pd.DataFrame, wanted: str | None = None) -> str | None:
    """Return the name of the baseline configuration; None if there is none.

    Results of a run record their baseline (`load_results` stores it in `results.attrs`). For
    others, such as a CSV alone, it is the first whose name begins with top_k or topk.

    Args:
        results: rows with a config_name.
        wanted: the caller's choice, which takes precedence.
    Raises:
        InputError: `wanted` isn't among the configurations.
    Example:
        >>> choose_baseline(pd.DataFrame({"config_name": ["bh_strict", "topk_4"]}))
        'topk_4'
    """
    names = [str(name) for name in results["config_name"].drop_duplicates()]
    if wanted is not None:
        if wanted not in names:
            raise unknown_name("baseline", wanted, names)
        return wanted
    if BASELINE in results.attrs:
        recorded = results.attrs[BASELINE]
        return recorded if recorded in names else None
    return next((name for name in names if re.match(r"top_?k(?![a-z])", name, re.I)), None)


def _checked(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    metrics = [metric for metric in METRICS if metric in results.columns]
    missing = [name for name in ("config_name", "prompt_text") if name not in results.columns]
    if missing or not metrics:
        wanted = ", ".join(missing) or "one of " + ", ".join(METRICS)
        raise InputError(
            f"the results lack {wanted}; read them with load_results or from bh_routing_results.csv"
        )
    rows = results.copy()
    if "status" not in rows.columns:
        rows["status"] = STATUS_OK
    if "prompt_category" not in rows.columns:
        rows["prompt_category"] = ""
    for metric in metrics:
        rows[metric] = pd.to_numeric(rows[metric], errors="coerce").astype(np.float64)
    return rows, metrics


def _by_prompt(ok: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Return one row per (configuration, prompt), in order of first appearance."""
    keys = ["config_name", "prompt_text"]
    means = ok.groupby(keys, sort=False)[metrics].mean()
    categories = ok.groupby(keys, sort=False)["prompt_category"].first()
    by_prompt = means.join(categories)
    by_prompt.attrs["repeats"] = len(ok) - len(by_prompt)
    return by_prompt


def _values(by_prompt: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the rows of one configuration, by prompt; empty if none of them is ok."""
    here = by_prompt.index.get_level_values("config_name") == name
    return by_prompt[here].droplevel("config_name")


def _configuration(
    rows: pd.DataFrame,
    by_prompt: pd.DataFrame,
    name: str,
    reference: str | None,
    metrics: list[str],
) -> dict[str, Any]:
    own = rows[rows["config_name"] == name]
    mine = _values(by_prompt, name)
    base = _values(by_prompt, reference) if reference else mine.iloc[:0]
    categories = {}
    for category in mine["prompt_category"].drop_duplicates():
        part = mine[mine["prompt_category"] == category]
        categories[str(category)] = {
            metric: describe(part[metric]) | {"reduction": _reductions(part, base, metric).mean}
            for metric in metrics
        }
    return {
        "rows": len(own),
        "failed": int((own["status"] != STATUS_OK).sum()),
        "is_baseline": name == reference,
        "metrics": {metric: describe(mine[metric]) for metric in metrics},
        "categories": categories,
    }


def describe(values: pd.Series | NDArray[np.float64]) -> dict[str, float]:
    """Return n, mean, sd (n - 1), 95 % t interval of the mean, min and max; NaN if unknown."""
    known_n = np.asarray(values, dtype=np.float64)
    known_n = known_n[np.isfinite(known_n)]
    ends = {"min": float(known_n.min()), "max": float(known_n.max())} if len(known_n) else {}
    nothing = {"min": math.nan, "max": math.nan}
    return mean_interval(known_n, confidence=CONFIDENCE)._asdict() | nothing | ends


def _reductions(mine: pd.DataFrame, base: pd.DataFrame, metric: str) -> MeanInterval:
    """Return the mean over common prompts of 1 - mine / base, with its t interval."""
    pairs = pd.concat([mine[metric], base[metric]], axis=1, join="inner", keys=["x", "y"])
    pairs = pairs[pairs["y"] != 0]
    share_n = (1.0 - pairs["x"] / pairs["y"]).to_numpy(dtype=np.float64)
    return mean_interval(share_n, confidence=CONFIDENCE)


def _comparisons(
    by_prompt: pd.DataFrame, names: list[str], reference: str | None, metrics: list[str]
) -> dict[str, dict[str, Any]]:
    if reference is None:
        return {}
    base = _values(by_prompt, reference)
    others = [name for name in names if name != reference]
    table: dict[str, dict[str, Any]] = {name: {} for name in others}
    for metric in metrics:
        for name in others:
            table[name][metric] = _compare(_values(by_prompt, name), base, metric)
        corrected = holm([table[name][metric]["p"] for name in others])
        for name, p_corrected in zip(others, corrected, strict=True):
            table[name][metric]["p_corrected"] = float(p_corrected)
            table[name][metric]["significant"] = bool(p_corrected < SIGNIFICANCE_LEVEL)
    return table


def _compare(mine: pd.DataFrame, base: pd.DataFrame, metric: str) -> dict[str, Any]:
    # Outer join: prompts that only one of the two finished count as pairs left out.
    pairs = pd.concat([mine[metric], base[metric]], axis=1, keys=["x", "y"])
    estimate = paired_difference(pairs["x"], pairs["y"], confidence=CONFIDENCE)
    both = pairs.dropna()
    reduction = _reductions(mine, base, metric)
    base_mean = float(both["y"].mean()) if len(both) else math.nan
    notes = [estimate.note] if estimate.note else []
    if estimate.left_out:
        notes.append(f"Prompts left out because one side has no value: {estimate.left_out}.")
    if (both["y"] == 0).any():
        notes.append("Prompts where the baseline is 0 have no reduction and are left out of it.")
    renamed = {"mean": "mean_difference", "sd": "sd_difference"}
    return {renamed.get(name, name): value for name, value in asdict(estimate).items()} | {
        "p_corrected": math.nan,
        "reduction": reduction.mean,
        "reduction_low": reduction.low,
        "reduction_high": reduction.high,
        "reduction_of_means": 1.0 - float(both["x"].mean()) / base_mean if base_mean else math.nan,
        "significant": False,
        "note": " ".join(notes),
    }


def _strict_dict(value: dict[str, Any]) -> dict[str, Any]:
    strict = to_strict(value)
    assert isinstance(strict, dict)
    return strict
