"""Choose the variant of BH-drop: equal mean experts, lowest loss, calibration text only.

    nice python benchmarks/drop_variants.py --tokens 6000

Half of the calibration documents fit the references, the other half choose. The evaluation text
is never read. Each rule's knob is bisected on captured router outputs and corrected once after
the first measurement. Writes `drop_variants.json` and `drop_variants.md`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import bh_routing
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.score import score
from bh_routing.engine.texts import Document, packaged_documents
from bh_routing.engine.windows import TokenizedDocument, tokenize_documents
from bh_routing.models import load_model
from bh_routing.models.routing import route
from bh_routing.nulls import Calibration
from bh_routing.nulls.limits import MIN_DOCUMENTS
from bh_routing.records import QualityRecord
from bh_routing.rules import (
    BenjaminiHochberg,
    BenjaminiHochbergDrop,
    Candidates,
    ContributionThreshold,
    Entropy,
    LayerContext,
    MinP,
    OracleContribution,
    Rule,
    Selector,
    TopK,
    TopP,
)
from bh_routing.rules.mixing import MixingRule

BUDGETS = (5.0, 4.0)
WINDOW = 512
TOLERANCE = 0.01
HERE = Path(__file__).parent
Knob = Callable[[float], Rule]


def drop(**fields: Any) -> tuple[Knob, bool]:
    """A variant of BH-drop by the log-odds of its alpha; a larger one keeps fewer."""
    return lambda x: BenjaminiHochbergDrop(_alpha(x), **fields), False


def fixed(**fields: Any) -> tuple[Knob, bool]:
    """A variant of the fixed threshold by its logarithm."""
    return lambda x: ContributionThreshold(math.exp(x), **fields), False


def _alpha(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))


# Name -> (number -> rule, whether a larger number keeps more).
VARIANTS: dict[str, tuple[Knob, bool]] = {
    "top_p": (lambda x: TopP(_alpha(x)), True),
    "min_p": (lambda x: MinP(_alpha(x)), False),
    "entropy": (lambda x: Entropy(math.exp(x)), True),
    "bh background": (lambda x: BenjaminiHochberg(_alpha(x)), True),
    "threshold contribution": fixed(statistic="contribution"),
    "threshold weight": fixed(statistic="weight"),
    "threshold sensitivity": fixed(statistic="sensitivity"),
    "threshold layer_sensitivity": fixed(statistic="layer_sensitivity"),
    "bh_drop token layer_sensitivity norm": drop(statistic="layer_sensitivity"),
    "bh_drop block 64 sensitivity norm": drop(
        scope="block", block_tokens=64, statistic="sensitivity"
    ),
    "bh_drop token contribution norm": drop(statistic="contribution"),
    "bh_drop token contribution loss": drop(statistic="contribution", needed="loss"),
    "bh_drop token sensitivity norm": drop(statistic="sensitivity"),
    "bh_drop token sensitivity loss": drop(statistic="sensitivity", needed="loss"),
    "bh_drop block 64 contribution norm": drop(
        scope="block", block_tokens=64, statistic="contribution"
    ),
    "bh_drop block 512 contribution norm": drop(
        scope="block", block_tokens=512, statistic="contribution"
    ),
    "bh_drop block 64 sensitivity loss": drop(
        scope="block", block_tokens=64, statistic="sensitivity", needed="loss"
    ),
    "oracle": (lambda x: OracleContribution(math.exp(x)), False),
}


@dataclass(frozen=True)
class Recorder(MixingRule):
    """Keep everything and remember what was proposed, layer by layer."""

    method: ClassVar[str] = "recorder"
    seen: tuple[list[Candidates], ...]

    @property
    def needs_output_norms(self) -> bool:
        """The oracle is bisected too."""
        return True

    def bind(self, context: LayerContext) -> Selector:
        """Append what comes to the layer's list."""
        mine = self.seen[context.layer]

        def select(candidates: Candidates) -> Tensor:
            mine.append(candidates)
            return torch.ones_like(candidates.top_k_index_TK, dtype=torch.bool)

        return select


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Halve the documents within each domain: one half fits, the other chooses."""
    ordered = sorted(documents, key=lambda d: (d.domain, d.cluster, d.name))
    return ordered[0::2], ordered[1::2]


def capture(
    model: Any, calibration: Calibration, text: Sequence[TokenizedDocument]
) -> tuple[list[Candidates], ...]:
    """Read the start of every document and return each layer's proposals."""
    seen: tuple[list[Candidates], ...] = tuple([] for _ in range(calibration.num_layers))
    with torch.inference_mode(), route(model, Recorder(seen)):
        for document in text:
            model(torch.tensor([document.ids[:WINDOW]]), use_cache=False, logits_to_keep=1)
    return seen


def mean_experts(rule: Rule, calibration: Calibration, seen: tuple[list[Candidates], ...]) -> float:
    """Mean number of slots that a rule keeps of captured proposals."""
    kept = total = 0
    null = rule.required_null or ""
    for layer, calls in enumerate(seen):
        # Bound by hand: on its way the search asks for alphas that no table can decide.
        select = rule.bind(
            LayerContext(
                layer=layer,
                num_experts=calibration.num_experts,
                model_top_k=calibration.model_top_k,
                device=torch.device("cpu"),
                table=calibration.table(null, layer)
                if null and null in calibration.tables
                else None,
                contributions=calibration.contributions,
            )
        )
        for candidates in calls:
            keep_TK = select(candidates)
            kept += int(keep_TK.sum())
            total += len(keep_TK)
    return kept / total


def bisect(measure: Callable[[float], float], target: float, *, rises: bool) -> float:
    """Find the number at which a monotone measure meets the target."""
    low, high = -12.0, 12.0
    for _ in range(16):
        middle = (low + high) / 2
        if (measure(middle) < target) == rises:
            low = middle
        else:
            high = middle
    return (low + high) / 2


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
    """Mean experts a token and layer."""
    return sum(r.experts_sum for r in records) / sum(r.units for r in records)


def per_token(records: Sequence[QualityRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the loss's rise in each document, and its tokens."""
    rise = np.array([r.nll_sum - r.top_k_nll_sum for r in records])
    return rise, np.array([r.tokens for r in records])


def describe(
    name: str, rule: Rule, records: list[QualityRecord], top_k: list[QualityRecord]
) -> dict[str, Any]:
    """One row: loss, and its difference to static top-k with a standard error by document."""
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
    model: Any,
    tokenizer: Any,
    text: Sequence[TokenizedDocument],
    calibration: Calibration,
    budget: float,
    only: str,
) -> list[dict[str, Any]]:
    """Compare all variants at one budget."""
    seen = capture(model, calibration, text)
    chosen = {name: entry for name, entry in VARIANTS.items() if only in name}

    def at(target: float, name: str) -> Rule:
        knob, rises = chosen[name]
        return knob(bisect(lambda x: mean_experts(knob(x), calibration, seen), target, rises=rises))

    rules: dict[str, Rule] = {"top_k": TopK(round(budget))}
    rules |= {name: at(budget, name) for name in chosen}
    records = measure_all(model, tokenizer, text, rules, calibration)
    again = {
        name: at(budget + budget - mean_of(records[name]), name)
        for name in chosen
        if abs(mean_of(records[name]) / budget - 1) > TOLERANCE
    }
    if again:
        records |= measure_all(model, tokenizer, text, again, calibration)
    rules |= again
    return [
        {"budget": budget, **describe(name, rule, records[name], records["top_k"])}
        for name, rule in rules.items()
    ]


def render(results: dict[str, Any]) -> str:
    """Render the rows as Markdown, lowest loss first."""
    made = results["made"]
    lines = [
        f"Fitted on {made['fit_documents']} calibration documents, compared on {made['tokens']:,} "
        f"tokens of {made['documents']} others; model {made['model'][:12]}, {made['date']}.",
        "",
        "| budget | variant | mean experts | Δ perplexity | ΔNLL − static top-k (± s.e.) | knob |",
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
    # Half of the packaged documents are fewer than a calibration must have. That limit guards
    # what an alpha means to a user; here only the order at equal cost is asked.
    calibration = replace(calibration, num_documents=max(len(fit), MIN_DOCUMENTS))
    text = tokenize_documents(tokenizer, choose, options.tokens)
    rows = []
    for budget in BUDGETS:
        rows += compare(model, tokenizer, text, calibration, budget, options.only)
        print(f"budget {budget:g} after {time.perf_counter() - start:.0f} s", flush=True)
    results = {
        "made": {
            "model": calibration.model_fingerprint,
            "fit_documents": len(fit),
            "fit_tokens": calibration.num_tokens,
            "documents": len(text),
            "tokens": sum(len(document.ids) for document in text),
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
