"""Calibrate on one domain and run on another: do the tuning parameter and alpha transfer?

    python -m benchmarks.transfer --device cuda    # measure
    python -m benchmarks.transfer --render         # only render the stored results

For each domain of the packaged calibration text, and for all of it, the reference samples are
fitted and each rule's tuning parameter is set to a mean of 5 experts on the same text. Both are
then fixed and run on each domain of the evaluation text. The domains have 9, 3 and 9 calibration
documents; the usual minimum of 20 is lifted here.

Writes `transfer.json`, and renders it to `transfer.md` and docs/method.md, between the markers.
Axes: R rules, D documents.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.wrong_drops import (
    CALIBRATION_TOKENS,
    DOMAINS,
    HERE,
    footer,
    made,
    percent,
    publish,
    save,
)
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.score import score
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, tokenize_documents
from bh_routing.experiments.search import KnobSearch
from bh_routing.experiments.settings import Goal, Setting
from bh_routing.experiments.variants import parse_variants
from bh_routing.experiments.wrong_drops import WINDOW, Judged, describe, judge
from bh_routing.models import load_model
from bh_routing.models.load import DeviceName, LoadedModel
from bh_routing.nulls import Calibration
from bh_routing.nulls.cut_offs import MIN_DOCUMENTS
from bh_routing.results.records import QualityRecord
from bh_routing.rules import BenjaminiHochbergDrop, Rule, TopK
from bh_routing.stats.clustered import estimate_ratio

BUDGET = 5.0
SEARCH_TOKENS = 6_000
SOURCES = (*DOMAINS, "all")
RULES = ("bh_drop", "bh_drop:scope=block", "contribution_threshold", "bh")
STATIC_K = (3, 4, 5, 6, 7)
MODEL_K = 8


def fit(
    loaded: LoadedModel, domain: str, search_tokens: int
) -> tuple[Calibration, dict[str, Setting]]:
    """Calibrate on one domain, and set each rule's tuning parameter there."""
    documents = [d for d in packaged_documents("calibration") if domain in ("all", d.domain)]
    calibration = calibrate(
        loaded.model,
        loaded.tokenizer,
        [document.text for document in documents],
        nulls=("background", "needed_by_loss"),
        max_tokens=CALIBRATION_TOKENS,
    )
    calibration = replace(calibration, num_documents=max(len(documents), MIN_DOCUMENTS))
    search = KnobSearch(loaded.model, loaded.tokenizer, documents, calibration, search_tokens)
    goals = [Goal(variant=variant, budget=BUDGET) for variant in parse_variants(RULES)]
    return calibration, {s.goal.variant.name: s for s in search.find(goals)}


def cost(records: Sequence[QualityRecord]) -> dict[str, float]:
    """Return mean experts, and the loss with its 95 % interval over clusters of documents."""
    ratio = estimate_ratio(
        [r.nll_sum - r.top_k_nll_sum for r in records],
        [r.tokens for r in records],
        [r.cluster for r in records],
    )
    low, high = (float(end[0]) for end in ratio.interval(0.95))
    return {
        "mean_experts": sum(r.experts_sum for r in records) / sum(r.units for r in records),
        "delta_nll": float(ratio.estimate_R[0]),
        "delta_nll_low": low,
        "delta_nll_high": high,
    }


def static_at(mean: float, losses: Sequence[float]) -> float:
    """Interpolate the loss of static top-k linearly at a fractional mean."""
    return float(np.interp(mean, [*STATIC_K, MODEL_K], [*losses, 0.0]))


def run(
    loaded: LoadedModel,
    text: Sequence[TokenizedDocument],
    rules: Mapping[str, Rule],
    calibration: Calibration | None,
) -> dict[tuple[str, str], list[QualityRecord]]:
    """Score rules on the text; return records by rule and domain."""
    records: dict[tuple[str, str], list[QualityRecord]] = {}
    for r in score(*loaded, text, rules, calibration, window=WINDOW, stride=WINDOW):
        records.setdefault((r.config_name, r.domain), []).append(r)
    return records


def measure(device: DeviceName, tokens: int | None, search_tokens: int) -> dict[str, Any]:
    """Calibrate on every source, run on every target."""
    start = time.perf_counter()
    loaded = load_model("demo", device=device, dtype="float32")
    text = tokenize_documents(loaded.tokenizer, packaged_documents("evaluation"), tokens)
    static = run(loaded, text, {str(k): TopK(k) for k in STATIC_K}, None)
    losses = {d: [cost(static[str(k), d])["delta_nll"] for k in STATIC_K] for d in DOMAINS}
    rows: list[dict[str, Any]] = []
    judged: list[Judged] = []
    for source in SOURCES:
        calibration, settings = fit(loaded, source, search_tokens)
        rules = {name: setting.rule for name, setting in settings.items()}
        records = run(loaded, text, rules, calibration)
        for (name, target), documents in records.items():
            found = cost(documents)
            rows.append(
                {
                    "rule": name,
                    "calibrated_on": source,
                    "run_on": target,
                    "knob": settings[name].knob,
                    "calibration_mean_experts": settings[name].mean_experts,
                    **found,
                    "static_delta_nll": static_at(found["mean_experts"], losses[target]),
                }
            )
        judged += [
            Judged(f"{name}, {source}", rule, calibration)
            for name, rule in rules.items()
            if isinstance(rule, BenjaminiHochbergDrop)
        ]
        print(f"{source} after {time.perf_counter() - start:.0f} s", flush=True)
    counts_DRF = judge(loaded.model, text, judged)
    wrong = [
        describe(item, counts_DRF[:, number], text, target)
        for number, item in enumerate(judged)
        for target in DOMAINS
    ]
    facts = made(loaded.model, judged[-1].calibration, text)
    return {"made": facts, "budget": BUDGET, "rows": rows, "wrong": wrong}


def render(results: dict[str, Any]) -> str:
    """Render the loss of a setting, and the meaning of its alpha, on other domains as Markdown."""
    rows = {(r["rule"], r["calibrated_on"], r["run_on"]): r for r in results["rows"]}
    head = " | ".join(f"run on {domain}" for domain in DOMAINS)
    align = "--:|" * len(DOMAINS)
    lines = [
        "Each cell: mean experts; ΔNLL (95 % interval); static top-k at that mean.",
        "",
        f"| rule | calibrated on | its tuning parameter | {head} |",
        f"|:--|:--|--:|{align}",
    ]
    for rule in dict.fromkeys(rule for rule, *_ in rows):
        for source in SOURCES:
            cells = [
                f"{r['mean_experts']:.2f}; {r['delta_nll']:.3f} ({r['delta_nll_low']:.3f} to "
                f"{r['delta_nll_high']:.3f}); {r['static_delta_nll']:.3f}"
                for r in (rows[rule, source, target] for target in DOMAINS)
            ]
            knob = rows[rule, source, DOMAINS[0]]["knob"]
            lines.append(f"| `{rule}` | {source} | {knob:.3f} | {' | '.join(cells)} |")
    wrong = {(r["variant"], r["domain"]): r for r in results["wrong"]}
    lines += [
        "",
        "Each cell: share of wrong drops, mean per token or block (95 % interval); α·π₀ there.",
        "",
        f"| rule | calibrated on | α | {head} |",
        f"|:--|:--|--:|{align}",
    ]
    for variant in dict.fromkeys(variant for variant, _ in wrong):
        rule, source = variant.split(", ")
        at = [wrong[variant, target] for target in DOMAINS]
        cells = [
            f"{percent(r['per_block'])}; {100 * r['alpha'] * r['share_mattered']:.1f} %" for r in at
        ]
        lines.append(f"| `{rule}` | {source} | {at[0]['alpha']:.3f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", footer(results)]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or read stored results, and render them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=None, help="evaluation tokens; default: all")
    parser.add_argument("--search-tokens", type=int, default=SEARCH_TOKENS)
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--render", action="store_true", help="only render the JSON again")
    parser.add_argument("--output", type=Path, default=HERE / "transfer.json")
    options = parser.parse_args(argv)
    if not options.render:
        results = measure(options.device, options.tokens, options.search_tokens)
        save(results, options.output)
    results = json.loads(options.output.read_text(encoding="utf-8"))
    if options.output.parent == HERE:
        publish("transfer", render(results), render(results))
    else:
        print(render(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
