"""Choose the variant of BH-drop: lowest loss at equal mean experts, on calibration text only.

    nice python benchmarks/drop_variants.py --tokens 6000

One half of the calibration documents is for fitting the reference samples, the other for choosing.
The evaluation text is never read. Tuning parameters are searched as in `bh-routing sweep`. Writes
`drop_variants.json` and `drop_variants.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bh_routing
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.score import score
from bh_routing.engine.texts import Document, packaged_documents
from bh_routing.engine.windows import TokenizedDocument
from bh_routing.experiments.search import KnobSearch
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.variants import parse_variants
from bh_routing.models import load_model
from bh_routing.nulls import Calibration
from bh_routing.nulls.cut_offs import MIN_DOCUMENTS
from bh_routing.results.records import QualityRecord
from bh_routing.rules import Rule, TopK

BUDGETS = (5.0, 4.0)
WINDOW = 512
HERE = Path(__file__).parent
VARIANTS = (
    "top_p",
    "min_p",
    "entropy",
    "bh",
    "contribution_threshold:statistic=contribution",
    "contribution_threshold:statistic=weight",
    "contribution_threshold:statistic=sensitivity",
    "contribution_threshold:statistic=layer_sensitivity",
    "bh_drop:statistic=layer_sensitivity",
    "bh_drop:scope=block,statistic=sensitivity",
    "bh_drop:statistic=contribution",
    "bh_drop:statistic=contribution,needed=loss",
    "bh_drop:statistic=sensitivity",
    "bh_drop:statistic=sensitivity,needed=loss",
    "bh_drop:scope=block,statistic=contribution",
    "bh_drop:scope=block,block_tokens=512,statistic=contribution",
    "bh_drop:scope=block,statistic=sensitivity,needed=loss",
    "oracle_contribution",
)


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Split the documents of each domain in half: one for fitting, one for choosing."""
    ordered = sorted(documents, key=lambda d: (d.domain, d.cluster, d.name))
    return ordered[0::2], ordered[1::2]


def measure_all(
    model: Any,
    tokenizer: Any,
    text: Sequence[TokenizedDocument],
    rules: dict[str, Rule],
    calibration: Calibration,
) -> dict[str, list[QualityRecord]]:
    """Score every rule once on the same text."""
    records: dict[str, list[QualityRecord]] = {name: [] for name in rules}
    for record in score(model, tokenizer, text, rules, calibration, window=WINDOW, stride=WINDOW):
        records[record.config_name].append(record)
    return records


def mean_of(records: Sequence[QualityRecord]) -> float:
    """Return the mean experts per token and layer."""
    return sum(r.experts_sum for r in records) / sum(r.units for r in records)


def per_token(records: Sequence[QualityRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Return the total increase in loss and the number of tokens, by document."""
    rise = np.array([r.nll_sum - r.top_k_nll_sum for r in records])
    return rise, np.array([r.tokens for r in records])


def describe(
    name: str, rule: Rule, records: list[QualityRecord], top_k: list[QualityRecord]
) -> dict[str, Any]:
    """Return a row: loss, and its difference from static top-k with a document-level SE."""
    rise, tokens = per_token(records)
    difference = rise - per_token(top_k)[0]
    mean_difference = difference.sum() / tokens.sum()
    residual = difference - mean_difference * tokens
    error = math.sqrt((residual**2).sum() * len(tokens) / (len(tokens) - 1)) / tokens.sum()
    return {
        "variant": name,
        "knob": repr(rule),
        "mean_experts": mean_of(records),
        "delta_nll": rise.sum() / tokens.sum(),
        "delta_perplexity_percent": 100 * math.expm1(rise.sum() / tokens.sum()),
        "against_top_k": mean_difference,
        "against_top_k_se": error,
    }


def compare(
    model: Any, tokenizer: Any, search: KnobSearch, calibration: Calibration, only: str
) -> list[dict[str, Any]]:
    """Tune every variant to every budget, and compare them there on the same text."""
    chosen = [variant for variant in parse_variants(VARIANTS) if only in variant.name]
    settings = search.find([Goal(variant=v, budget=b) for v in chosen for b in BUDGETS])
    own: dict[str, Rule] = {f"top_k@{budget:g}": TopK(round(budget)) for budget in BUDGETS}
    rules = own | {setting.goal.config_name: setting.rule for setting in settings}
    records = measure_all(model, tokenizer, search.text.documents, rules, calibration)
    rows = []
    for config_name, rule in rules.items():
        name, _, budget = config_name.rpartition("@")
        row = describe(name, rule, records[config_name], records[f"top_k@{budget}"])
        rows.append({"budget": float(budget), **row})
    return rows


def render(results: dict[str, Any]) -> str:
    """Render the rows as Markdown, lowest loss first."""
    made = results["made"]
    lines = [
        f"Fitted on {made['fit_documents']} calibration documents, compared on {made['tokens']:,} "
        f"tokens of {made['documents']} others; model {made['model'][:12]}, {made['date']}.",
        "",
        "| budget | variant | mean experts | Δ perplexity | ΔNLL − static top-k (± s.e.) "
        "| tuning parameter |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['budget']:g} | {row['variant']} | {row['mean_experts']:.2f} | "
        f"{row['delta_perplexity_percent']:+.1f} % | {row['against_top_k']:+.4f} ± "
        f"{row['against_top_k_se']:.4f} | `{row['knob']}` |"
        for row in sorted(results["rows"], key=lambda r: (-r["budget"], r["delta_nll"]))
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Fit, compare, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000, help="tokens to compare on")
    parser.add_argument("--fit-tokens", type=int, default=10_000, help="tokens to fit on")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--output", type=Path, default=HERE / "drop_variants")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    model, tokenizer = load_model("demo", device="cpu", dtype="float32")
    fit, choose = split(packaged_documents("calibration"))
    calibration = calibrate(
        model,
        tokenizer,
        [document.text for document in fit],
        nulls=("background", "needed", "needed_by_loss"),
        max_tokens=options.fit_tokens,
    )
    # Half of the packaged documents are fewer than a calibration requires. That limit protects
    # the meaning of alpha for users; here only the ranking at equal cost matters.
    calibration = replace(calibration, num_documents=max(len(fit), MIN_DOCUMENTS))
    search = KnobSearch(model, tokenizer, choose, calibration, options.tokens)
    rows = compare(model, tokenizer, search, calibration, options.only)
    print(f"compared after {time.perf_counter() - start:.0f} s", flush=True)
    results = {
        "made": {
            "model": calibration.model_fingerprint,
            "fit_documents": len(fit),
            "fit_tokens": calibration.num_tokens,
            "documents": len(search.text.documents),
            "tokens": search.num_tokens,
            "bh_routing": bh_routing.__version__,
            "torch": torch.__version__,
            "machine": f"{platform.system()} {platform.machine()}, CPU",
            "date": datetime.now(UTC).date().isoformat(),
        },
        "rows": rows,
    }
    options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    options.output.with_suffix(".md").write_text(render(results), "utf-8")
    print(render(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
