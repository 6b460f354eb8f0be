"""The HTML report's table of experiments, which can be sorted, filtered and expanded."""

from __future__ import annotations

import math
from typing import Any, Final

from bh_routing.report.facts import Facts
from bh_routing.report.text import as_float

NUMBERS: Final = {
    "avg_experts_per_token": "experts",
    "avg_experts_prefill": "in prefill",
    "avg_experts_decode": "in decode",
    "num_output_tokens": "tokens",
    "inference_time_sec": "seconds",
    "tokens_per_sec": "tokens/s",
    "expert_utilization_cv": "load CV",
}


def experiment_table(facts: Facts, configs: list[str], prompts: list[str]) -> dict[str, Any]:
    """Return the finished experiments, with configurations and prompts by index.

    Args:
        facts: the run.
        configs, prompts: names and texts that the indices refer to.
    """
    frame = facts.table.frame
    columns = {name: label for name, label in NUMBERS.items() if name in frame.columns}
    categories = frame.drop_duplicates("prompt_text").set_index("prompt_text")["prompt_category"]
    texts = frame["generated_text"] if "generated_text" in frame.columns else [""] * len(frame)
    return {
        "configs": configs,
        "baseline": facts.baseline,
        "prompts": prompts,
        "categories": [str(categories[prompt]) for prompt in prompts],
        "columns": list(columns.values()),
        "rows": [
            [
                configs.index(row["config_name"]),
                prompts.index(row["prompt_text"]),
                [_number(row[name]) for name in columns],
                str(text),
            ]
            for (_, row), text in zip(frame.iterrows(), texts, strict=True)
        ],
    }


def _number(value: Any) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(as_float(value)) else None
