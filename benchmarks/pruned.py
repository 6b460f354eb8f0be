"""Compare scores for pruning: loss of the demo model with fewer experts in every layer.

    python -m benchmarks.pruned --tokens 20000 --work FOLDER

Scores the experts on the packaged calibration text, prunes the model by each score to each number
of experts, and scores each checkpoint on the packaged evaluation text. FOLDER keeps the losses by
document, so the same command resumes. Writes `pruned.json`, `pruned.md` and the table between the
markers of docs/pruning.md.
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

from bh_routing.engine.expert_scores import MEANINGS, ExpertUse, best_experts, observe_experts
from bh_routing.engine.score import score
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, tokenize_documents
from bh_routing.experiments.defaults import CALIBRATION_TOKENS
from bh_routing.experiments.identity import library_versions
from bh_routing.models.expert_axes import block_of, open_checkpoint
from bh_routing.models.load import load_model
from bh_routing.models.prune import write_pruned
from bh_routing.models.routers import find_routers
from bh_routing.results.files import render_json, write_atomically
from bh_routing.rules.fixed import TopK
from bh_routing.stats.clustered import RatioEstimate, estimate_ratio
from bh_routing.stats.paired import holm

KEPT = (56, 48, 40, 32)
WINDOW = 1024
COMPARED = "reap"
"""The score that the others are compared with."""
HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "pruning.md"
BLOCK = re.compile(r"(<!-- pruned: .*? -->\n).*(<!-- pruned: end -->)", re.DOTALL)


def losses_of(name: str, text: Sequence[TokenizedDocument]) -> dict[str, float]:
    """Return the sum of the losses of each document's tokens, by the document's key."""
    model, tokenizer = load_model(name, dtype="float32")
    rule = TopK(find_routers(model).model_top_k)
    records = score(model, tokenizer, text, {"own": rule}, window=WINDOW, stride=WINDOW)
    return {record.document_key: record.nll_sum for record in records}


def losses_pruned(
    use: ExpertUse, by: Any, keep: int, text: Sequence[TokenizedDocument], routers: Sequence[str]
) -> dict[str, float]:
    """Prune the demo model and return its losses."""
    kept_LK = best_experts(use.scores(by, seed=0), keep)
    kept = {block_of(r): experts.tolist() for r, experts in zip(routers, kept_LK, strict=True)}
    with TemporaryDirectory() as folder:
        write_pruned(open_checkpoint("demo"), kept, {}, Path(folder) / "pruned")
        return losses_of(str(Path(folder) / "pruned"), text)


def measure(tokens: int | None, work: Path) -> dict[str, Any]:
    """Return the losses of every checkpoint, from the folder where they are known."""
    model, tokenizer = load_model("demo", dtype="float32")
    text = tokenize_documents(tokenizer, packaged_documents("evaluation"), tokens)
    routers = [site.name for site in find_routers(model).sites]
    use: ExpertUse | None = None
    losses: dict[str, dict[str, float]] = {}
    for name in ("original", *(f"{by}-{keep}" for by in MEANINGS for keep in KEPT)):
        file = work / f"{name}-{sum(len(d.ids) for d in text)}.json"
        if not file.exists():
            by, _, keep = name.partition("-")
            if by == "original":
                found = losses_of("demo", text)
            else:
                use = use or observe_experts(
                    model, tokenizer, packaged_documents("calibration"),
                    by_loss=True, max_tokens=CALIBRATION_TOKENS,
                )  # fmt: skip
                found = losses_pruned(use, by, int(keep), text, routers)
            write_atomically(file, render_json(found))
        losses[name] = json.loads(file.read_text(encoding="utf-8"))
        print(name, sum(losses[name].values()), flush=True)
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
        "losses": losses,
    }  # fmt: skip


def difference(results: dict[str, Any], name: str, reference: str) -> RatioEstimate:
    """Estimate the difference of two checkpoints' losses in nats per token."""
    documents, losses = results["documents"], results["losses"]
    return estimate_ratio(
        [losses[name][d["key"]] - losses[reference][d["key"]] for d in documents],
        [d["tokens"] for d in documents],
        [d["cluster"] for d in documents],
    )


def render(results: dict[str, Any]) -> str:
    """Render the table."""
    documents = results["documents"]
    pairs = [(keep, by) for keep in KEPT for by in MEANINGS]
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
        estimate = difference(results, f"{by}-{keep}", "original")
        ends = [float(end[0]) for end in estimate.interval()]
        low, high = (100 * math.expm1(end) for end in ends)
        change = 100 * math.expm1(float(estimate.estimate_R[0]))
        cells = [f"{change:+.1f} % ({low:.1f} to {high:.1f})", "–", "–"]
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
