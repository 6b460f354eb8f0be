"""Collect the tables of an evidence folder: the results of one model under the protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from bh_routing.analysis.sweep_records import ALL_DOMAINS
from bh_routing.results.files import find_json_object, read_json_object, to_strict
from bh_routing.results.records import (
    CALIBRATION_PART,
    ESTIMATE_JSON,
    ESTIMATE_PART,
    EVIDENCE_PARTS,
    NULL_RULES_JSON,
    OUTCOME_JSON,
    PROTOCOL_JSON,
    PRUNING_TABLE_JSON,
    WRONG_DROPS_JSON,
)
from bh_routing.stats.clustered import estimate_ratio
from bh_routing.stats.paired import holm

REFERENCE_SCORE: Final = "reap"
"""The score that other scores for pruning are compared with."""
SIGNIFICANCE_LEVEL: Final = 0.05
_POINT: Final = ["rule", "variant", "budget", "mean_experts", "mean_distinct_experts", "delta_nll",
                 "delta_nll_low", "delta_nll_high"]  # fmt: skip
_COMPARISON: Final = ["variant", "budget", "reference", "answer", "saved", "saved_low",
                      "saved_high", "p_corrected"]  # fmt: skip
_QUALITY: Final = ["config_name", "mean_experts", "perplexity", "delta_nll", "delta_nll_low",
                   "delta_nll_high"]  # fmt: skip


def collect_evidence(folder: Path) -> dict[str, Any]:
    """Return the settings, the outcome of each part, and the table of each finished part.

    Args:
        folder: the output of `bh-routing evidence`.
    Raises:
        ResultsError: the folder isn't one, or a file is damaged.
    """
    protocol = read_json_object(folder / PROTOCOL_JSON)
    estimate = find_json_object(folder / ESTIMATE_PART / ESTIMATE_JSON) or {}
    collected: dict[str, Any] = {
        "protocol": protocol,
        **{name: estimate.get(name) for name in ("model", "provenance", "scored_tokens")},
        "parts": {},
    }
    tables = {
        "equal_cost": _sweep,
        "decode_steps": _sweep,
        "nulls": _nulls,
        "wrong_drops": _wrong_drops,
        "pruning": _pruning,
    }
    for part in (CALIBRATION_PART, *EVIDENCE_PARTS):
        outcome = find_json_object(folder / part / OUTCOME_JSON)
        collected["parts"][part] = outcome
        if part in tables and outcome is not None and outcome.get("reason") is None:
            collected[part] = tables[part](folder / part)
    strict: dict[str, Any] = to_strict(collected)
    return strict


def _sweep(folder: Path) -> dict[str, Any]:
    points = pd.read_csv(folder / "points.csv")
    points = points[~points["is_curve_only"] & points["variant"].notna()]
    compared = pd.read_csv(folder / "comparisons.csv")
    compared = compared[compared["domain"] == ALL_DOMAINS]
    return {
        "points": points[_POINT].to_dict("records"),
        "comparisons": compared[_COMPARISON].to_dict("records"),
    }


def _nulls(folder: Path) -> dict[str, Any]:
    quality = read_json_object(folder / "quality.json")
    rules = read_json_object(folder / NULL_RULES_JSON)
    against = quality["static_top_k"]
    return {
        "rules": [
            {name: row[name] for name in _QUALITY}
            | {"config_name": rules["names"][row["config_name"]]}
            | {"answer": _answer(against.get(row["config_name"], {}))}
            | {"static": against.get(row["config_name"], {}).get("at_mean")}
            for row in quality["rules"]
        ],
        "out_of_reach": rules["out_of_reach"],
    }


def _wrong_drops(folder: Path) -> list[dict[str, Any]]:
    rows = read_json_object(folder / WRONG_DROPS_JSON)["rows"]
    return [row for row in rows if row["domain"] == ALL_DOMAINS]


def _pruning(folder: Path) -> list[dict[str, Any]]:
    """Return a row per score and size: its loss, and the difference from the reference score's."""
    table = read_json_object(folder / PRUNING_TABLE_JSON)
    documents = table["documents"]
    rows = []
    for name in table["nll"]:
        score, _, keep = name.rpartition("-")
        if not score:
            continue
        loss = _difference(table, name, "original")
        row: dict[str, Any] = {"score": score, "keep": int(keep)}
        row |= {"fraction": int(keep) / table["num_experts"], "p": np.nan}
        row |= {"delta_nll": loss[0], "delta_nll_low": loss[1], "delta_nll_high": loss[2]}
        if score != REFERENCE_SCORE:
            own = _difference(table, name, f"{REFERENCE_SCORE}-{keep}")
            row |= dict(zip(("difference", "low", "high", "p"), own, strict=True))
        rows.append(row)
    corrected = holm([row["p"] for row in rows])
    clusters = len({document["cluster"] for document in documents})
    for row, p in zip(rows, corrected, strict=True):
        row["p_corrected"], row["clusters"] = p, clusters
        row["answer"] = _answer(row)
    return rows


def _answer(row: Mapping[str, Any]) -> str:
    """Return whether the loss is lower than that compared with, by the corrected p alone.

    Joint intervals need more: one comparison without spread, as of a rule that is nearly static
    top-1, makes those of all infinite.
    """
    p, difference = row.get("p_corrected"), row.get("difference")
    if p is None or difference is None or not np.isfinite(p):
        return "unknown"
    if p >= SIGNIFICANCE_LEVEL:
        return "undecided"
    return "yes" if difference < 0 else "no"


def _difference(
    table: Mapping[str, Any], name: str, other: str
) -> tuple[float, float, float, float]:
    """Return the mean difference of losses per token, its interval and two-sided p."""
    documents, nll = table["documents"], table["nll"]
    estimate = estimate_ratio(
        [nll[name][d["key"]] - nll[other][d["key"]] for d in documents],
        [d["tokens"] for d in documents],
        [d["cluster"] for d in documents],
    )
    low, high = (float(end[0]) for end in estimate.interval())
    return float(estimate.estimate_R[0]), low, high, float(estimate.p_different()[0])


def read_evidence(path: Path) -> dict[str, Any]:
    """Read collected evidence from its file, or collect that of a folder.

    Raises:
        ResultsError: as `collect_evidence`.
    """
    return collect_evidence(path) if path.is_dir() else dict(json.loads(path.read_text("utf-8")))
