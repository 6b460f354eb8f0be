"""Hand-made results with the columns of the CSV: small, seeded and of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bh_routing.records import CSV_COLUMNS

STANDARD = {
    "topk_8": 8.0,
    "bh_strict": 3.6,
    "bh_moderate": 4.9,
    "bh_loose": 5.7,
    "bh_adaptive": 4.8,
}
CATEGORIES = ("simple", "medium", "complex", "domain_specific")


def make_results(
    configs: dict[str, float] | Sequence[str] | None = None, num_prompts: int = 12, seed: int = 0
) -> pd.DataFrame:
    """Build a results table whose numbers look like a run's."""
    rng = np.random.default_rng(seed)
    means = dict.fromkeys(configs, 4.0) if isinstance(configs, Sequence) else configs or STANDARD
    length = rng.integers(5, 40, num_prompts)
    level = rng.normal(0, 0.25, num_prompts)
    rows: list[dict[str, Any]] = []
    for name, mean in means.items():
        for prompt in range(num_prompts):
            static = name.startswith("topk")
            experts = mean if static else float(np.clip(mean + level[prompt], 1, 8))
            seconds = float(0.6 + rng.normal(0, 0.03) + (0.0 if static else 0.07))
            rows.append(
                dict.fromkeys(CSV_COLUMNS, math.nan)
                | {
                    "config_name": name,
                    "prompt_text": f"Prompt number {prompt}",
                    "prompt_category": CATEGORIES[prompt * 4 // max(num_prompts, 4)],
                    "prompt_description": "what it tests",
                    "generated_text": f"A continuation of {prompt} by {name}.",
                    "num_input_tokens": int(length[prompt]),
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
            )
    return pd.DataFrame(rows, columns=list(CSV_COLUMNS))


def make_quality() -> dict[str, Any]:
    """Quality records in the shape of the summary's."""
    values = {
        "topk_8": (8.0, 0.0, 0.0),
        "topk_5": (5.0, 0.068, 0.004),
        "topk_4": (4.0, 0.151, 0.006),
        "bh_strict": (3.4, 0.39, 0.012),
        "bh_moderate": (4.85, 0.147, 0.008),
        "bh_loose": (5.6, 0.09, 0.006),
        "bh_adaptive": (4.85, 0.15, 0.008),
    }
    return {
        "rules": [
            {
                "config_name": name,
                "mean_experts": experts,
                "tokens": 10_000,
                "documents": 41,
                "nll": 2.9 + delta,
                "delta_nll": delta,
                "delta_nll_low": delta - 2 * error,
                "delta_nll_high": delta + 2 * error,
                "perplexity_ratio": math.exp(delta),
                "kl_mean": delta * 0.8,
                "kl_p99": delta * 9,
                "same_top1_share": 1.0 - delta,
            }
            for name, (experts, delta, error) in values.items()
        ]
    }


@pytest.fixture
def results() -> pd.DataFrame:
    """The standard run: five configurations, twelve prompts."""
    return make_results()


@pytest.fixture
def quality() -> dict[str, Any]:
    """Quality records of a standard run."""
    return make_quality()
