"""Folders of a sweep with known truths, made without any model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from bh_routing.analysis.sweep_records import ScoredText
from bh_routing.results.records import QUALITY_JOURNAL, RUN_JSON, SCHEMA_VERSION, QualityRecord
from tests.analysis.scored import LAYERS, scored_documents

STATIC_LOSSES = {3: 0.56, 4: 0.24, 5: 0.11, 6: 0.05}


def with_experts(
    records: Sequence[QualityRecord], mean: float, drift: float = 0.0
) -> list[QualityRecord]:
    """Let documents of the first domain keep `drift` more experts than those of the second."""
    return [
        replace(
            record,
            experts_sum=round(
                record.tokens
                * LAYERS
                * (mean + drift / 2 * (1 if record.domain == "prose" else -1))
            ),
        )
        for record in records
    ]


def point(rule: str, budget: float, **fields: Any) -> dict[str, Any]:
    """One point of run.json."""
    variant = str(fields.get("variant", ""))
    name = "-".join(part for part in (rule, variant) if part)
    return {
        "config_name": f"{name}@{budget:g}",
        "rule": rule,
        "variant": variant,
        "knob": 0.5,
        "knob_field": "alpha",
        "config": {"method": rule},
        "budget": budget,
        "calibration_mean_experts": budget,
        "corrections": 1,
        "unreachable": None,
    } | fields


def write_sweep(
    folder: Path,
    points: Sequence[Mapping[str, Any]],
    records: Sequence[QualityRecord],
    static: Sequence[int] = tuple(STATIC_LOSSES),
    curve_points: Sequence[Mapping[str, Any]] = (),
    **blocks: Any,
) -> Path:
    """Write run.json and quality.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    run = {
        "schema_version": SCHEMA_VERSION,
        "kind": "sweep",
        "model": {"name": "demo"},
        "sweep": {
            "budgets": sorted({p["budget"] for p in points}, reverse=True),
            "points": list(points),
            "curve_points": list(curve_points),
            "references": [{"config_name": f"topk_{k}", "k": k} for k in static],
        },
    } | blocks
    (folder / RUN_JSON).write_text(json.dumps(run))
    lines = (json.dumps(asdict(record)) + "\n" for record in records)
    (folder / QUALITY_JOURNAL).write_text("".join(lines))
    return folder


def usual_records(documents: int = 42) -> list[QualityRecord]:
    """Static top-k at 3 to 6, top-p a tenth below it, a good rule and a bad one at 5 and 4."""
    records = []
    for k, loss in STATIC_LOSSES.items():
        own = scored_documents(f"topk_{k}", delta=loss, spread=0.05 * loss, documents=documents)
        records += with_experts(own, k)
        own = scored_documents(f"top_p@{k}", delta=0.9 * loss, spread=0.05 * loss, seed=7,
                               documents=documents)  # fmt: skip
        records += with_experts(own, k + 0.01)
    for k in (5, 4):
        for name, share in (("bh_drop-block", 0.6), ("bh", 3.0)):
            loss = share * STATIC_LOSSES[k]
            own = scored_documents(f"{name}@{k}", delta=loss, spread=0.05 * loss, seed=k,
                                   documents=documents)  # fmt: skip
            records += with_experts(own, k + 0.05, drift=0.2)
    return records


def usual_points() -> list[dict[str, Any]]:
    """The points of `usual_records`."""
    return [
        *(point("top_p", k) for k in STATIC_LOSSES),
        *(point("bh_drop", k, variant="block") for k in (5, 4)),
        *(point("bh", k) for k in (5, 4)),
    ]


def scored_text(
    tokens: Sequence[float],
    losses: Mapping[str, Sequence[float]],
    experts: Mapping[str, Sequence[float]],
) -> ScoredText:
    """Documents that are a cluster each, from values per token."""
    tokens_D = np.asarray(tokens, dtype=np.float64)
    clusters = np.array([f"book {i:03}" for i in range(len(tokens))])
    return ScoredText(
        names=tuple(losses),
        losses_DC=np.array([losses[n] for n in losses], dtype=np.float64).T * tokens_D[:, None],
        cost_DC=np.array([experts[n] for n in losses], dtype=np.float64).T * tokens_D[:, None],
        tokens_D=tokens_D,
        clusters_D=clusters,
        draws_D=np.zeros(len(tokens), dtype=np.int64),
        domains_D=np.array(["prose"] * len(tokens)),
    )
