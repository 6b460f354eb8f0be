"""Compare BH-drop with one reference sample per layer and one for all layers, at equal means.

    python benchmarks/needed_by_layer.py

Fits on half of the packaged calibration documents and compares on the other half, like
`drop_variants.py`, without the evaluation text. Writes `needed_by_layer.json` and
`needed_by_layer.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from scipy.optimize import brentq

from benchmarks.drop_variants import BUDGETS, WINDOW, describe, measure_all, split
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.observe import LayerSlots, SlotObserver, join_windows, summarize
from bh_routing.engine.proposals import capture_proposals, mean_experts
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, tokenize_documents
from bh_routing.models import find_routers, load_model
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.contributions import Contributions, Statistic
from bh_routing.nulls.cut_offs import MIN_DOCUMENTS
from bh_routing.rules import BenjaminiHochbergDrop, LayerContext, Rule, Selector, TopK
from bh_routing.rules.base import MixingRule

Cut = Literal["pooled", "own"]
"""Whether a slot mattered is judged by the median of all layers, or of its own layer."""
STATISTICS: tuple[Statistic, ...] = ("contribution", "sensitivity")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class DropByLayer(MixingRule):
    """BH-drop by token, with the reference sample of its own layer."""

    method: ClassVar[str] = "drop_by_layer"
    inner: BenjaminiHochbergDrop
    layers: tuple[Contributions, ...]

    @property
    def keeps_best_by_logit(self) -> bool:
        """As BH-drop."""
        return False

    def bind(self, context: LayerContext) -> Selector:
        """Bind BH-drop to this layer's scores only."""
        return self.inner.bind(replace(context, contributions=self.layers[context.layer]))


def observe(model: Any, text: Sequence[TokenizedDocument]) -> list[LayerSlots]:
    """Process the text once more and return every slot, by layer."""
    observer = SlotObserver(model, find_routers(model), by_loss=True)
    try:
        return join_windows(
            [
                observer.read(torch.tensor([document.ids[start : start + WINDOW]]))
                for document in text
                for start in range(0, len(document.ids), WINDOW)
            ]
        )
    finally:
        observer.close()


def by_layer(pooled: Contributions, slots: list[LayerSlots], cut: Cut) -> tuple[Contributions, ...]:
    """Return the references of each layer, with unchanged scales."""
    found = []
    for layer, seen in enumerate(slots):
        truth = seen.truth("norm")
        mattered = truth > (truth.median() if cut == "own" else pooled.cuts["norm"])
        scores = {s: seen.weights * pooled.scales[s][layer, seen.experts] for s in STATISTICS}
        found.append(
            replace(
                pooled,
                all_scores={s: ReferenceTable.from_scores(v) for s, v in scores.items()},
                needed_scores={
                    (s, "norm"): ReferenceTable.from_scores(v[mattered]) for s, v in scores.items()
                },
            )
        )
    return tuple(found)


def compare(tokens: int, fit_tokens: int) -> dict[str, Any]:
    """Fit, search each variant's alpha for each budget on captured proposals, and score once."""
    model, tokenizer = load_model("demo", device="cpu", dtype="float32")
    fit, choose = split(packaged_documents("calibration"))
    texts = [document.text for document in fit]
    calibration = calibrate(model, tokenizer, texts, nulls=("background",), max_tokens=2_000)
    slots = observe(model, tokenize_documents(tokenizer, fit, fit_tokens))
    pooled = summarize(slots, calibration.num_experts, 10**6, seed=0)
    calibration = replace(
        calibration, contributions=pooled, num_tokens=fit_tokens, num_documents=MIN_DOCUMENTS
    )
    references = {cut: by_layer(pooled, slots, cut) for cut in ("pooled", "own")}
    text = tokenize_documents(tokenizer, choose, tokens)
    routers = find_routers(model)
    seen = capture_proposals(
        model, tokenizer, text, window=WINDOW, num_candidates=calibration.model_top_k
    )

    def rule(statistic: Statistic, cut: Cut | None, log_odds: float) -> Rule:
        alpha = float(torch.tensor(log_odds, dtype=torch.float64).sigmoid())
        plain = BenjaminiHochbergDrop(alpha, statistic=statistic)
        return plain if cut is None else DropByLayer(inner=plain, layers=references[cut])

    def excess(log_odds: float, make: Callable[[float], Rule], budget: float) -> float:
        return mean_experts(make(log_odds), seen, routers, calibration) - budget

    rows = []
    for budget in BUDGETS:
        rules: dict[str, Rule] = {"static top-k": TopK(round(budget))}
        for statistic in STATISTICS:
            for cut in (None, "pooled", "own"):
                name = "one table for all layers" if cut is None else f"a table a layer, {cut} cut"
                make = partial(rule, statistic, cut)
                found = brentq(excess, -12.0, 12.0, args=(make, budget), xtol=1e-3)
                rules[f"{statistic}, {name}"] = make(found)
        records = measure_all(model, tokenizer, text, rules, calibration)
        for name, kept in rules.items():
            row = describe(name, kept, records[name], records["static top-k"])
            rows.append({"budget": budget} | {k: v for k, v in row.items() if k != "knob"})
    return {
        "made": {
            "fit_tokens": fit_tokens,
            "tokens": sum(len(document.ids) for document in text),
            "documents": len(text),
            "torch": torch.__version__,
            "machine": f"{platform.system()} {platform.machine()}, CPU",
            "date": datetime.now(UTC).date().isoformat(),
        },
        "rows": rows,
    }


def render(results: dict[str, Any]) -> str:
    """Render the rows as Markdown."""
    lines = [
        "| budget | statistic and reference | mean experts | ΔNLL | − static top-k (± s.e.) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['budget']:g} | {row['variant']} | {row['mean_experts']:.2f} "
        f"| {row['delta_nll']:+.4f} | {row['against_top_k']:+.4f} ± {row['against_top_k_se']:.4f} |"
        for row in results["rows"]
    ]
    made = results["made"]
    lines += [
        "",
        f"Fitted on {made['fit_tokens']:,} tokens, compared on {made['tokens']:,} tokens of "
        f"{made['documents']} other calibration documents; torch {made['torch']}, "
        f"{made['machine']}, {made['date']}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=5_000, help="tokens to compare on")
    parser.add_argument("--fit-tokens", type=int, default=8_000, help="tokens to fit on")
    options = parser.parse_args(argv)
    results = compare(options.tokens, options.fit_tokens)
    written = HERE / "needed_by_layer.json"
    written.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    written.with_suffix(".md").write_text(render(results), encoding="utf-8")
    print(render(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
