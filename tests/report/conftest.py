"""Hand-made results with the columns of the CSV: small, seeded and of any shape."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bh_routing.analysis.quality import QualityOptions, analyze_quality
from bh_routing.results.records import CSV_COLUMNS, KL_BIN_EDGES, QualityRecord

STANDARD = {
    "topk_8": 8.0,
    "bh_strict": 3.6,
    "bh_moderate": 4.9,
    "bh_loose": 5.7,
    "bh_adaptive": 4.8,
}
CATEGORIES = ("simple", "medium", "complex", "domain-specific")
LOSSES = {
    "topk_8": (8.0, 0.0),
    "topk_5": (5.0, 0.068),
    "topk_4": (4.0, 0.151),
    "bh_strict": (3.4, 0.39),
    "bh_moderate": (4.85, 0.147),
    "bh_loose": (5.6, 0.09),
    "bh_adaptive": (4.85, 0.15),
}
"""Mean experts and increase of NLL on the evaluation text."""

MakeResults = Callable[..., pd.DataFrame]
FillFolder = Callable[..., Path]


def build_results(
    configs: Mapping[str, float] | Sequence[str] | None = None, num_prompts: int = 12, seed: int = 0
) -> pd.DataFrame:
    """Build a results table whose numbers look like a run's."""
    rng = np.random.default_rng(seed)
    means = configs if isinstance(configs, Mapping) else dict.fromkeys(configs or (), 4.0)
    level = rng.normal(0, 0.25, num_prompts)
    rows = [
        _row(name, mean, prompt, num_prompts, float(level[prompt]), rng)
        for name, mean in (means or STANDARD).items()
        for prompt in range(num_prompts)
    ]
    return pd.DataFrame(rows, columns=list(CSV_COLUMNS))


def _row(
    name: str,
    mean: float,
    prompt: int,
    num_prompts: int,
    level: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    static = name.startswith("topk")
    experts = mean if static else float(np.clip(mean + level, 1, 8))
    seconds = float(0.6 + rng.normal(0, 0.03) + (0.0 if static else 0.07))
    return dict.fromkeys(CSV_COLUMNS, math.nan) | {
        "config_name": name,
        "prompt_text": f"Prompt number {prompt}",
        "prompt_category": CATEGORIES[prompt * 4 // max(num_prompts, 4)],
        "prompt_description": "what it tests",
        "generated_text": f"A continuation of {prompt} by {name}.",
        "num_input_tokens": 5 + prompt,
        "num_output_tokens": 50,
        "avg_experts_per_token": experts,
        "std_experts_per_token": 0.0 if static else 2.1,
        "min_experts": 8.0 if static else 1.0,
        "max_experts": 8.0,
        "avg_experts_prefill": experts,
        "avg_experts_decode": experts,
        "inference_time_sec": seconds,
        "prefill_time_sec": 0.05,
        "decode_time_sec": seconds - 0.05,
        "tokens_per_sec": 50 / seconds,
        "expert_utilization_cv": float(0.62 + 0.05 * (8 - mean) + rng.normal(0, 0.03)),
        "expert_utilization_cv_noise": 0.33 + 0.02 * (8 - mean),
        "expert_utilization_note": "layer 0 has an unused expert",
        "status": "ok",
        "error": "",
    }


@cache
def build_quality() -> dict[str, Any]:
    """The quality block that the analysis makes of 24 hand-made documents."""
    rng = np.random.default_rng(1)
    records = [
        _document(name, experts, loss, document, float(rng.normal(0, 0.02)))
        for document in range(24)
        for name, (experts, loss) in LOSSES.items()
    ]
    return analyze_quality(records, QualityOptions(resamples=500))


def _document(name: str, experts: float, loss: float, document: int, noise: float) -> QualityRecord:
    tokens, layers, num_experts = 400, 2, 64
    delta = (loss + noise) * tokens if loss else 0.0
    histogram = [0] * (len(KL_BIN_EDGES) + 1)
    histogram[60 if loss else 0] = tokens
    kept = round(experts * tokens)
    low = kept // tokens
    kept_by_tokens = [0] * low + [tokens - kept % tokens, kept % tokens]
    counts = [kept // num_experts + (e < kept % num_experts) for e in range(num_experts)]
    return QualityRecord(
        config_name=name,
        rule={"method": "top_k" if name.startswith("topk") else "bh"},
        document=f"document {document}",
        document_key=f"hash of {document}",
        cluster=f"document {document}",
        domain="prose",
        tokens=tokens,
        nll_sum=2.9 * tokens + delta,
        top_k_nll_sum=2.9 * tokens,
        kl_sum=0.8 * loss * tokens,
        kl_max=9 * loss,
        kl_histogram=histogram,
        same_top1=int(tokens * (1 - loss)),
        delta_p_sum=-0.1 * loss * tokens,
        delta_p_square_sum=0.02 * loss * tokens,
        early_tokens=100,
        early_delta_nll_sum=delta / 4,
        experts_sum=kept * layers,
        units=tokens * layers,
        expert_load=[counts] * layers,
        count_histogram=[kept_by_tokens] * layers,
        jaccard_sum=[tokens * experts / 8] * layers,
    )


RUN: dict[str, Any] = {
    "schema_version": 1,
    "spec": {
        "max_tokens": 50,
        "configs": {
            "topk_8": {"method": "top_k", "k": 8, "description": "Baseline"},
            "bh_strict": {"method": "bh", "alpha": 0.01, "null": "background", "max_k": 8},
        },
    },
    "model": {
        "name": "demo",
        "num_layers": 6,
        "num_experts": 64,
        "model_top_k": 8,
        "num_parameters": 10_900_000,
        "dtype": "float32",
        "device": "cpu",
        "device_name": "x86_64",
        "fingerprint": "ab" * 16,
    },
    "nulls": [
        {
            "name": "background",
            "alpha_is": "tuning parameter",
            "meaning": "a tuning parameter, not an error rate: noise is rejected too",
            "noise": [
                {
                    "config_name": "bh_strict",
                    "alpha": 0.01,
                    "mean_experts": 4.10,
                    "share_any": 0.97,
                    "share_any_low": 0.967,
                    "share_any_high": 0.973,
                    "tokens": 10_000,
                },
                {
                    "config_name": "bh_moderate",
                    "alpha": 0.05,
                    "mean_experts": 5.47,
                    "share_any": 0.9912,
                    "share_any_low": 0.989,
                    "share_any_high": 0.993,
                    "tokens": 10_000,
                },
            ],
        }
    ],
    "provenance": {
        "bh_routing": "0.1.0",
        "cpu_count": 2,
        "threads": 2,
        "seed": 0,
        "started_at": "2026-01-31T00:30:00+00:00",
    },
    "timing": {"load_sec": 1.0, "calibrate_sec": 2.2, "experiments_sec": 36.0},
    "peak_memory_bytes": 800_000_000,
}


@pytest.fixture
def make_results() -> MakeResults:
    """Configurations (names, or name -> mean experts), prompts and seed -> a results table."""
    return build_results


@pytest.fixture
def results() -> pd.DataFrame:
    """The standard run: five configurations, twelve prompts."""
    return build_results()


@pytest.fixture
def quality() -> dict[str, Any]:
    """The quality block of a standard run, static top-k at 4 and 5 experts beside it."""
    return build_quality()


@pytest.fixture
def run_document() -> dict[str, Any]:
    """A run.json, to be changed as a test likes."""
    return copy.deepcopy(RUN)


@pytest.fixture
def fill_folder(tmp_path: Path) -> FillFolder:
    """Write a results table and a run.json into a folder, as a run leaves them."""

    def fill(results: pd.DataFrame, run: Mapping[str, Any] = RUN) -> Path:
        # Quoted, so that a lone carriage return in a text stays in its cell.
        results.to_csv(
            tmp_path / "bh_routing_results.csv", index=False, quoting=csv.QUOTE_NONNUMERIC
        )
        (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
        return tmp_path

    return fill
