"""Compare rules for decode steps at equal distinct experts, at several batch sizes.

    python -m benchmarks.step_rules sweep --output FOLDER
    python -m benchmarks.step_rules sweep --output FOLDER --device cuda --model PATH --tokens 20000
    python -m benchmarks.step_rules all --output FOLDER packaged=demo seed-1=PATH seed-2=PATH
    python -m benchmarks.step_rules collect packaged=FOLDER seed-1=FOLDER

For each batch size, `sweep` runs `bh-routing sweep --cost distinct` into its own folder of the
output, and resumes there. `all` does so for several models, each sweep in a process of its own, and
leaves the folders NAME/batch-B. `collect` gathers the sweeps of several models into
`step_rules.json`, `step_rules.md` and the table of docs/method.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.wrong_drops import HERE, publish
from bh_routing.analysis.sweep import ALL_DOMAINS
from bh_routing.experiments.specs import SweepSpec, make_spec
from bh_routing.experiments.sweep import sweep
from bh_routing.report.sweep import conclude_sweep
from bh_routing.results.files import to_strict

BUDGETS = [0.75, 0.65]
POINT = ["variant", "budget", "mean_distinct_experts", "mean_experts", "perplexity_ratio",
         "delta_nll", "delta_nll_low", "delta_nll_high", "tokens"]  # fmt: skip
COMPARISON = ["variant", "budget", "reference", "answer", "difference", "low", "high",
              "p_corrected", "saved", "saved_low", "saved_high"]  # fmt: skip
OURS = {
    "bh_drop-step-sensitivity-refill-16": "`bh_drop` step, refilled",
    "bh_drop-step_population-sensitivity-refill-16": "`bh_drop` step_population, refilled",
    "fisher_mass-sensitivity-refill-16": "`fisher_mass`, refilled",
    "bh_drop-step_population-sensitivity": "`bh_drop` step_population",
}
REFERENCES = {
    "top_k": "static top-k",
    "bh_drop": "`bh_drop` per token",
    "oea": "OEA",
    "expert_budget": "gate-mass budget",
}


def run_sweeps(options: argparse.Namespace) -> None:
    """Sweep the rules at each batch size."""
    for batch in options.batches:
        folder = options.output / f"batch-{batch}"
        spec = make_spec(
            SweepSpec, model=options.model, device=options.device, dtype="float32", output=folder,
            cost="distinct", decode_batch=batch, budgets=options.budgets, tokens=options.tokens,
        )  # fmt: skip
        sweep(spec)
        conclude_sweep(folder)


def run_all(options: argparse.Namespace) -> None:
    """Sweep several models, the largest batches first, each sweep in its own process."""
    start = time.perf_counter()
    # Each process would use all cores.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.jobs))}

    def work(task: tuple[int, str]) -> None:
        batch, named = task
        name, _, path = named.partition("=")
        folder = options.output / name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.step_rules", "sweep", "--model", path]
        command += ["--device", options.device, "--batches", str(batch), "--output", str(folder)]
        command += ["--tokens", str(options.tokens)] if options.tokens else []
        with (folder / f"batch-{batch}.log").open("w", encoding="utf-8") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, check=False, env={**threads, **os.environ}
            ).returncode
        print(f"{name}, B = {batch}: exit code {code}, {time.perf_counter() - start:.0f} s")

    tasks = [(batch, named) for batch in sorted(options.batches)[::-1] for named in options.models]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(work, tasks))


def read_sweep(model: str, folder: Path) -> dict[str, Any]:
    """Read the points and comparisons of one batch size, at the budgets."""
    run = json.loads((folder / "run.json").read_text("utf-8"))
    points, compared = (pd.read_csv(folder / f"{n}.csv") for n in ("points", "comparisons"))
    points, compared = (table[table["budget"].isin(BUDGETS)] for table in (points, compared))
    compared = compared[compared["domain"] == ALL_DOMAINS]
    return {
        "model": model,
        "decode_batch": int(folder.name.rpartition("-")[2]),
        "fingerprint": run["model"]["fingerprint"],
        "machine": run["model"]["device_name"],
        "provenance": run["provenance"],
        "points": points[POINT].to_dict("records"),
        "comparisons": compared[COMPARISON].to_dict("records"),
    }


def render(sweeps: Sequence[dict[str, Any]]) -> str:
    """Render the loss of our rules as a fraction of the references'."""
    lines = [
        f"| model | B | read | rule | experts | Δ perplexity | {' | '.join(REFERENCES.values())} |",
        f"|:--|--:|--:|:--|--:|--:|{'--:|' * len(REFERENCES)}",
    ]
    for found in sweeps:
        for budget in BUDGETS:
            for variant, name in OURS.items():
                (point,) = _select(found["points"], variant, budget)
                answers = _select(found["comparisons"], variant, budget)
                by_reference = {row["reference"]: row for row in answers}
                cells = [_ratio(by_reference.get(reference)) for reference in REFERENCES]
                loss = f"{100 * (point['perplexity_ratio'] - 1):+.1f} %"
                lines.append(
                    f"| {found['model']} | {found['decode_batch']} | {100 * budget:.0f} % | {name} "
                    f"| {point['mean_distinct_experts']:.1f} | {loss} | {' | '.join(cells)} |"
                )
    return "\n".join(lines) + "\n"


def _select(rows: Sequence[dict[str, Any]], variant: str, budget: float) -> list[dict[str, Any]]:
    return [row for row in rows if (row["variant"], row["budget"]) == (variant, budget)]


def _ratio(row: dict[str, Any] | None) -> str:
    if row is None or row["answer"] == "unknown":
        return "–"
    ratio, low, high = (1 - row[name] for name in ("saved", "saved_high", "saved_low"))
    mark = "" if row["answer"] == "yes" else f" ({row['answer']})"
    return f"{ratio:.2f} ({low:.2f} to {high:.2f}){mark}"


def main() -> None:
    """Sweep, or collect the results of sweeps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sweeping = commands.add_parser("sweep", help="run the sweeps of one model")
    sweeping.add_argument("--output", type=Path, required=True)
    sweeping.add_argument("--model", default="demo")
    sweeping.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    sweeping.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    sweeping.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    sweeping.add_argument("--tokens", type=int, help="scored tokens; default: the whole text")
    everything = commands.add_parser("all", help="run the sweeps of several models in parallel")
    everything.add_argument("models", nargs="+", metavar="NAME=MODEL")
    everything.add_argument("--output", type=Path, required=True)
    everything.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    everything.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    everything.add_argument("--tokens", type=int, help="scored tokens; default: the whole text")
    everything.add_argument("--jobs", type=int, default=os.cpu_count(), help="sweeps at a time")
    collecting = commands.add_parser("collect", help="gather sweeps into one table")
    collecting.add_argument("folders", nargs="+", metavar="NAME=FOLDER")
    options = parser.parse_args()
    if options.command in ("sweep", "all"):
        run_sweeps(options) if options.command == "sweep" else run_all(options)
        return
    sweeps = [
        read_sweep(model, folder)
        for model, _, path in (named.partition("=") for named in options.folders)
        for folder in sorted(Path(path).glob("batch-*/"), key=lambda f: int(f.name[6:]))
    ]
    (HERE / "step_rules.json").write_text(
        json.dumps(to_strict(sweeps), indent=1) + "\n", encoding="utf-8"
    )
    table = render(sweeps)
    publish("step_rules", table, table)


if __name__ == "__main__":
    main()
