"""Compare null distributions: mean experts, loss at three alphas, and static top-k at each mean.

    python benchmarks/null_ablation.py --tokens 100000 --device cuda

Calibrates on the packaged calibration text, scores the packaged evaluation text, and writes
`null_ablation.json`, `null_ablation.md` and the table between the markers of docs/method.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import bh_routing
from bh_routing.analysis.quality import analyze_quality
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.score import score
from bh_routing.engine.texts import packaged_documents
from bh_routing.experiments.evidence_parts import null_rules, split_by_reach, static_rules
from bh_routing.experiments.quality_text import prepare_text
from bh_routing.models.load import load_model
from bh_routing.models.routers import describe_model
from bh_routing.nulls import NULLS
from bh_routing.nulls.contributions import NEEDED
from bh_routing.rules import Rule

HERE = Path(__file__).parent
METHOD = HERE.parent / "docs" / "method.md"
BLOCK = re.compile(r"(<!-- null ablation: .*? -->\n).*(<!-- null ablation: end -->)", re.DOTALL)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, score every rule on the same tokens, and compute intervals of the losses."""
    start = time.perf_counter()
    model, tokenizer = load_model(options.model, device=options.device, dtype="float32")
    facts = describe_model(model)
    calibration = calibrate(
        model,
        tokenizer,
        [document.text for document in packaged_documents("calibration")],
        nulls=[*(n for n, null in NULLS.items() if null.needs_table), *NEEDED.values()],
        max_tokens=options.fit_tokens,
    )
    served, refused = split_by_reach(model, null_rules(), calibration)
    print(f"calibrated after {time.perf_counter() - start:.0f} s", flush=True)
    top_k = static_rules(calibration.model_top_k)
    text = prepare_text(
        tokenizer, facts, packaged_documents("evaluation"), max_tokens=options.tokens
    )
    rules: dict[str, Rule] = {**top_k, **served}
    records = list(
        score(
            *(model, tokenizer, text.documents, rules, calibration),
            window=text.window,
            stride=text.stride,
        )
    )
    rows = {row["config_name"]: row for row in analyze_quality(records)["rules"]}
    ks = [rows[name]["mean_experts"] for name in top_k]
    losses = [rows[name]["delta_nll"] for name in top_k]
    kept = ("mean_experts", "delta_nll", "delta_nll_low", "delta_nll_high")
    return {
        "made": {
            "command": f"python benchmarks/null_ablation.py --tokens {options.tokens} "
            f"--fit-tokens {options.fit_tokens}",
            "model": f"{options.model} ({calibration.model_fingerprint[:12]})",
            "fit_tokens": calibration.num_tokens,
            "tokens": sum(record.tokens for record in records) // len(rules),
            "documents": len(text.documents),
            "device": facts.device,
            "dtype": facts.dtype,
            "bh_routing": bh_routing.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": machine(model),
            "date": datetime.now(UTC).date().isoformat(),
            "seconds": round(time.perf_counter() - start),
        },
        "rows": [
            {"name": name}
            | {column: rows[name][column] for column in kept}
            | {"top_k_delta_nll": float(np.interp(rows[name]["mean_experts"], ks, losses))}
            for name in rules
        ],
        "refused": refused,
    }


def machine(model: Any) -> str:
    """Return the name of the device."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{platform.system()} {platform.machine()}, CPU, {torch.get_num_threads()} threads"


def render(results: dict[str, Any]) -> str:
    """Render the rows as Markdown."""
    lines = [
        "| rule and null | tuning parameter | mean experts | ΔNLL (95 %) | static top-k there |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        what, knob = row["name"].split(" | ")
        is_top_k = what == "top_k"
        there = "–" if is_top_k else f"{row['top_k_delta_nll']:+.4f}"
        ends = (row["delta_nll_low"], row["delta_nll_high"])
        interval = "" if None in ends else f" ({ends[0]:+.4f} to {ends[1]:+.4f})"
        lines.append(
            f"| {what} | {knob} | {row['mean_experts']:.2f} | {row['delta_nll']:+.4f}{interval} "
            f"| {there} |"
        )
    lines += [f"| {name} | out of reach | – | – |" for name in results["refused"]]
    made = results["made"]
    lines += [
        "",
        f"Model {made['model']}, {made['dtype']}; fitted on {made['fit_tokens']:,} calibration "
        f"tokens, scored on {made['tokens']:,} tokens of {made['documents']} evaluation documents; "
        f"{made['machine']}, torch {made['torch']}, transformers {made['transformers']}, "
        f"bh-routing {made['bh_routing']}, {made['date']}. `{made['command']}`",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the JSON, the Markdown and the table of docs/method.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to score")
    parser.add_argument("--fit-tokens", type=int, default=49_152, help="tokens to calibrate on")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--output", type=Path, default=HERE / "null_ablation")
    options = parser.parse_args(argv)
    written = json.dumps(measure(options), indent=1) + "\n"
    options.output.with_suffix(".json").write_text(written, encoding="utf-8")
    table = render(json.loads(written))
    options.output.with_suffix(".md").write_text(table, encoding="utf-8")
    if options.output == HERE / "null_ablation":
        page = METHOD.read_text(encoding="utf-8")
        page = BLOCK.sub(lambda found: found[1] + table + found[2], page)
        METHOD.write_text(page, encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
