"""Compare scores for pruning, alone and under rules: loss of the demo model with fewer experts.

    python -m benchmarks.pruned --tokens 20000 --work FOLDER

Scores the experts on the packaged calibration text, prunes the model by each score to each number
of experts, and scores each checkpoint on the packaged evaluation text; some also under static top-k
and population BH at 5 experts per token. FOLDER keeps the losses by document, so the same command
resumes. Writes `pruned.json`, `pruned.md` and the tables between the markers of docs/pruning.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bh_routing.engine.calibrate import calibrate, cut_windows, tokenize_distinct
from bh_routing.engine.expert_scores import MEANINGS, best_experts, observe_experts
from bh_routing.engine.observe import SlotObserver
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, spread_tokens, tokenize_documents
from bh_routing.experiments.defaults import CALIBRATION_TOKENS
from bh_routing.experiments.evidence_parts import score_with
from bh_routing.experiments.identity import library_versions
from bh_routing.experiments.search import KnobSearch
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.variants import variants_of
from bh_routing.models.expert_axes import block_of, open_checkpoint
from bh_routing.models.load import load_model
from bh_routing.models.prune import write_pruned
from bh_routing.models.routers import find_routers
from bh_routing.results.files import render_json, write_atomically
from bh_routing.rules import ContributionThreshold
from bh_routing.rules.fixed import TopK
from bh_routing.stats.clustered import RatioEstimate, estimate_ratio
from bh_routing.stats.paired import holm

KEPT = (56, 48, 40, 32)
NORMALISED = "reap_normalised"
"""REAP with each token's weights divided by their sum, as in its repository."""
RULED = ("original", "fisher_mass-56", "fisher_mass-48")
"""Checkpoints that are scored under rules, too."""
BUDGET = 5
COMPARED = "reap"
"""The score that the others are compared with."""
SCORES = (*MEANINGS, NORMALISED)
HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "pruning.md"
BLOCK = re.compile(r"(<!-- pruned: .*? -->\n).*(<!-- pruned: end -->)", re.DOTALL)


def score_under_rules(name: str, text: Sequence[TokenizedDocument], *, ruled: bool) -> Any:
    """Score a checkpoint under its own top-k, and if `ruled` under two rules at the budget."""
    model, tokenizer = load_model(name, dtype="float32")
    scored = {"own": score_with(model, tokenizer, text, TopK(find_routers(model).model_top_k))}
    if ruled:
        documents = packaged_documents("calibration")
        rule = ContributionThreshold(1.0, statistic="sensitivity")
        calibration = calibrate(model, tokenizer, documents, rules=[rule])
        search = KnobSearch(model, tokenizer, documents, calibration)
        (setting,) = search.find([Goal(variant=variants_of([rule])[0], budget=BUDGET)])
        scored["static top-k"] = score_with(model, tokenizer, text, TopK(BUDGET))
        scored["population BH"] = score_with(model, tokenizer, text, setting.rule, calibration)
    return scored


def normalised_reap(model: Any, tokenizer: Any) -> Tensor:
    """Return REAP's scores with each token's weights divided by their sum."""
    routers = find_routers(model)
    texts = [document.text for document in packaged_documents("calibration")]
    read = list(tokenize_distinct(tokenizer, texts).values())
    taken = spread_tokens([len(ids) for ids in read], CALIBRATION_TOKENS)
    sums_LE, counts_LE = torch.zeros(2, len(routers.sites), routers.num_experts)
    observer = SlotObserver(model, routers, by_loss=False)
    for _, window in cut_windows(model, read, taken):
        for layer, slots in enumerate(observer.read(window)):
            weights_TK = slots.weights / slots.weights.sum(-1, keepdim=True)
            terms = (weights_TK * slots.norms).flatten()
            sums_LE[layer].index_add_(0, slots.experts.flatten(), terms)
            counts_LE[layer].index_add_(0, slots.experts.flatten(), torch.ones_like(terms))
    observer.close()
    return sums_LE / counts_LE.clamp_min(1)


def all_scores() -> dict[str, Tensor]:
    """Return the scores of the demo model's experts by each definition."""
    model, tokenizer = load_model("demo", dtype="float32")
    use = observe_experts(
        model, tokenizer, packaged_documents("calibration"),
        by_loss=True, max_tokens=CALIBRATION_TOKENS,
    )  # fmt: skip
    scores: dict[str, Tensor] = {by: use.scores(by, seed=0) for by in MEANINGS}
    return {**scores, NORMALISED: normalised_reap(model, tokenizer)}


def measure(tokens: int | None, work: Path) -> dict[str, Any]:
    """Return the losses of every checkpoint, from the folder where they are known."""
    model, tokenizer = load_model("demo", dtype="float32")
    text = tokenize_documents(tokenizer, packaged_documents("evaluation"), tokens)
    routers = [site.name for site in find_routers(model).sites]
    scores: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    for name in ("original", *(f"{by}-{keep}" for by in SCORES for keep in KEPT)):
        file = work / f"{name}-{tokens or 'all'}.json"
        if not file.exists():
            by, _, keep = name.partition("-")
            with TemporaryDirectory() as folder:
                source = "demo"
                if keep:
                    scores = scores or all_scores()
                    kept_LK = best_experts(scores[by], int(keep)).tolist()
                    kept = dict(zip(map(block_of, routers), kept_LK, strict=True))
                    source = str(Path(folder) / "pruned")
                    write_pruned(open_checkpoint("demo"), kept, {}, Path(source))
                result = score_under_rules(source, text, ruled=name in RULED)
            write_atomically(file, render_json(result))
        found[name] = json.loads(file.read_text(encoding="utf-8"))
        print(name, sum(found[name]["own"]["nll"].values()), flush=True)
    return {
        "made": {
            **library_versions(),
            "machine": platform.machine(),
            "tokens": tokens,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        },
        "documents": [
            {"key": d.key, "cluster": d.cluster, "tokens": len(d.ids)} for d in text
        ],
        "scored": found,
    }  # fmt: skip


def difference(
    results: dict[str, Any], name: str, reference: str = "original", rule: str = "own"
) -> RatioEstimate:
    """Estimate the difference of two checkpoints' losses in nats per token.

    Args:
        results: as measured.
        name: a checkpoint, scored under `rule`.
        reference: a checkpoint, scored under its own top-k.
        rule: the rule.
    """
    documents, scored = results["documents"], results["scored"]
    losses, others = scored[name][rule]["nll"], scored[reference]["own"]["nll"]
    return estimate_ratio(
        [losses[d["key"]] - others[d["key"]] for d in documents],
        [d["tokens"] for d in documents],
        [d["cluster"] for d in documents],
    )


def as_change(estimate: RatioEstimate) -> str:
    """Return a difference of losses as a change of perplexity."""
    low, high = (100 * math.expm1(float(end[0])) for end in estimate.interval())
    return f"{100 * math.expm1(float(estimate.estimate_R[0])):+.1f} % ({low:.1f} to {high:.1f})"


def render_rules(results: dict[str, Any]) -> list[str]:
    """Render pruned checkpoints under rules."""
    lines = ["| experts | rule | experts per token | Δ perplexity, 95 % |", "|--:|:--|--:|--:|"]
    for name in RULED:
        for rule, scored in results["scored"][name].items():
            shown = "the model's own top-k" if rule == "own" else rule
            change = as_change(difference(results, name, rule=rule))
            if (name, rule) == ("original", "own"):
                change = "–"
            number = name.partition("-")[2] or "64"
            lines.append(f"| {number} | {shown} | {scored['mean_experts']:.2f} | {change} |")
    return lines


def render(results: dict[str, Any]) -> str:
    """Render the tables."""
    documents = results["documents"]
    pairs = [(keep, by) for keep in KEPT for by in SCORES]
    against = {
        (keep, by): difference(results, f"{by}-{keep}", f"{COMPARED}-{keep}")
        for keep, by in pairs
        if by != COMPARED
    }
    corrected = dict(
        zip(against, holm([float(e.p_different()[0]) for e in against.values()]), strict=True)
    )
    lines = [
        f"| experts | score | Δ perplexity, 95 % | ΔNLL − `{COMPARED}`'s, 95 % | p, Holm |",
        "|--:|:--|--:|--:|--:|",
    ]
    for keep, by in pairs:
        cells = [as_change(difference(results, f"{by}-{keep}")), "–", "–"]
        if (keep, by) in against:
            other = against[keep, by]
            low, high = (float(end[0]) for end in other.interval())
            cells[1] = f"{float(other.estimate_R[0]):+.3f} ({low:+.3f} to {high:+.3f})"
            cells[2] = f"{corrected[keep, by]:.2g}"
        lines.append(f"| {keep} | `{by}` | {' | '.join(cells)} |")
    made = results["made"]
    clusters = len({d["cluster"] for d in documents})
    tokens = int(np.sum([d["tokens"] for d in documents]))
    asked = f"--tokens {made['tokens']} " if made["tokens"] else ""
    lines += [
        "",
        "The checkpoints by Fisher mass, under rules at equal experts per token:",
        "",
        *render_rules(results),
        "",
        f"{tokens:,} tokens of {clusters} documents of the packaged evaluation text, float32, "
        f"{made['machine']}, {made['date']}, torch {made['torch']}; `python -m benchmarks.pruned "
        f"{asked}--work FOLDER`.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or resume, and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, help="scored tokens; default: the whole text")
    parser.add_argument("--work", type=Path, required=True, help="folder of the losses")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    results = measure(options.tokens, options.work)
    (HERE / "pruned.json").write_bytes(render_json(results))
    table = render(results)
    (HERE / "pruned.md").write_text(table, encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda m: m[1] + table + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
