"""Compare exponents of the mass in `fisher_mass`, refilled, on calibration text.

    python -m benchmarks.step_exponents --output FOLDER

Each second document calibrates and tunes, the others are scored, all cut in two so that there are
more than the 16 sequences of a step; clusters are whole documents. Writes the sweep into FOLDER and
`step_exponents.md`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from benchmarks.wrong_drops import HERE
from bh_routing.analysis.sweep_records import read_sweep
from bh_routing.engine.texts import Document, packaged_documents
from bh_routing.experiments.specs import SweepSpec, make_spec
from bh_routing.experiments.sweep import sweep
from bh_routing.report.sweep import conclude_sweep
from bh_routing.results.records import QualityRecord
from bh_routing.stats.clustered import estimate_ratio

EXPONENTS = (1.0, 1.5, 2.0, 2.5, 3.0)
BUDGETS = [0.75, 0.65]
DECODE_BATCH = 16
REFILL = 16


def write_halves(documents: Sequence[Document], path: Path) -> str:
    """Write both halves of each document, as documents of one cluster."""
    lines = []
    for name, text, cluster, domain in documents:
        middle = text.index(" ", len(text) // 2)
        for number, half in enumerate((text[:middle], text[middle:])):
            fields = {"name": f"{name}.{number}", "cluster": cluster, "domain": domain}
            lines.append(json.dumps({"text": half, **fields}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def render(folder: Path) -> str:
    """Render the loss of each exponent at each budget, and its difference from exponent 2's."""
    records: dict[str, list[QualityRecord]] = defaultdict(list)
    for record in sorted(read_sweep(folder).records, key=lambda r: r.document_key):
        records[record.config_name].append(record)
    points = pd.read_csv(folder / "points.csv")
    points = points[(points["rule"] == "fisher_mass") & (points["domain"] == "all")]
    lines = [
        "| exponent | budget | distinct experts | increase in loss | difference from exponent 2 |",
        "|--:|--:|--:|--:|--:|",
    ]
    for point in points.itertuples():
        own, two = (
            records[f"fisher_mass-exponent-{e}-sensitivity-refill-{REFILL}@{point.budget:g}"]
            for e in (point.variant.split("-")[2], "2.0")
        )
        difference = estimate_ratio(
            [r.nll_sum - other.nll_sum for r, other in zip(own, two, strict=True)],
            [r.tokens for r in own],
            [r.cluster for r in own],
            draws=[r.draw for r in own],
        )
        (low,), (high,) = difference.interval()
        ends = "–" if own is two else f"{difference.estimate_R[0]:+.4f} ({low:+.4f} to {high:+.4f})"
        lines.append(
            f"| {point.variant.split('-')[2]} | {100 * point.budget:.0f} % "
            f"| {point.mean_distinct_experts:.1f} | {point.delta_nll:+.4f} | {ends} |"
        )
    tokens = sum(record.tokens for record in own) // 2
    footer = (
        f"Nats per token; B = {DECODE_BATCH}, refill {REFILL}, {tokens:,} tokens of "
        f"{difference.num_clusters} documents in two draws of companions; 95 % intervals, paired."
    )
    return "\n".join([*lines, "", footer]) + "\n"


def main() -> None:
    """Sweep, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    documents = packaged_documents("calibration")
    known, unseen = (
        write_halves(documents[start::2], options.output / f"{name}.jsonl")
        for start, name in enumerate(("known", "unseen"))
    )
    rules = [f"fisher_mass:exponent={e},statistic=sensitivity,refill={REFILL}" for e in EXPONENTS]
    spec = make_spec(
        SweepSpec, model="demo", device=options.device, dtype="float32", output=options.output,
        rules=rules, budgets=BUDGETS, cost="distinct", decode_batch=DECODE_BATCH,
        calibration_texts=[known], texts=[unseen], tokens=options.tokens,
    )  # fmt: skip
    sweep(spec)
    conclude_sweep(options.output)
    (HERE / "step_exponents.md").write_text(render(options.output), encoding="utf-8")


if __name__ == "__main__":
    main()
