"""Compare rules on models whose routers don't weigh as OLMoE's do, and on a larger model.

    python -m benchmarks.other_families train --corpus PIECES --work FOLDER --output OUT
    python -m benchmarks.other_families sweep --work FOLDER --output OUT
    python -m benchmarks.other_families collect OUT/renormalised.tar.gz OUT/sigmoid.tar.gz
    python -m benchmarks.other_families render

`train` requires a GPU: it trains the presets of tools/train_demo.py concurrently, and leaves their
training records and logs in OUT; the same command continues a training that the end of its call
interrupted. `sweep` sweeps the rules on the small models, per token over the packaged evaluation
text and in decode steps of 16 sequences, all concurrently. `collect` analyses both kinds of sweeps
and writes `other_families.json`, which `render` turns into `other_families.md`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.other_seeds import KEPT, at_budgets, by_loss, read_sweep
from benchmarks.wrong_drops import HERE
from bh_routing.analysis.sweep import STEP_REFERENCES, analyze_sweep
from bh_routing.results.files import to_strict

SECONDS = {"larger": 450.0, "renormalised": 150.0, "sigmoid": 150.0}
"""Length of each preset's schedule while all three share a GPU."""
SWEPT = ("renormalised", "sigmoid")
RULES = (
    *("bh", "bh_drop", "bh_drop:scope=block", "contribution_threshold", "top_p"),
    "per_layer_top_k",
)
SWEEPS = {
    "tokens": [
        *("--budget", "5", "--budget", "4"),
        *(part for rule in RULES for part in ("--rule", rule)),
    ],
    "steps": [
        *("--cost", "distinct", "--decode-batch", "16", "--tokens", "20000"),
        *("--budget", "0.75", "--budget", "0.65"),
    ],
}
STEP_COLUMNS = (
    *("rule", "variant", "budget", "mean_experts", "mean_distinct_experts"),
    *("delta_nll", "delta_nll_low", "delta_nll_high", "perplexity_ratio", "tokens"),
)
STEP_RULES = ("bh_drop", "fisher_mass", "expert_budget")


def train(options: argparse.Namespace) -> None:
    """Train the presets concurrently, each in a process of its own."""
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def work(preset: str) -> None:
        model = options.work / preset
        command = [sys.executable, "-m", "tools.train_demo", "--preset", preset]
        command += ["--corpus", options.corpus, "--output", model]
        command += ["--state", options.work / f"state-{preset}"]
        command += ["--total-seconds", str(options.scale * SECONDS[preset])]
        command += ["--call-seconds", str(options.call_seconds)]
        with (options.output / f"{preset}.log").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        print(f"{preset}: exit code {code}, {time.monotonic() - start:.0f} s", flush=True)
        if code:
            print(Path(log.name).read_text("utf-8")[-2000:], flush=True)
        else:
            shutil.copy(model / "training.json", options.output / f"{preset}.json")

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, options.presets))


def sweep(options: argparse.Namespace) -> None:
    """Run both kinds of sweeps on the models concurrently, and archive what `collect` reads."""
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()

    def work(task: tuple[str, str]) -> None:
        kind, preset = task
        model, swept = options.work / preset, options.work / f"{kind}-{preset}"
        swept.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bh_routing", "sweep", "--model", str(model), "--no-fp16"]
        command += [*SWEEPS[kind], "--output", str(swept)]
        command += ["--tokens", str(options.tokens)] if options.tokens else []
        with (options.work / f"{kind}-{preset}.log").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        print(f"{kind} {preset}: exit code {code}, {time.monotonic() - start:.0f} s", flush=True)
        if code:
            print(Path(log.name).read_text("utf-8")[-2000:], flush=True)
        shutil.copy(log.name, swept / "log.txt")
        shutil.copy(model / "training.json", swept)

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, [(kind, preset) for kind in SWEEPS for preset in options.presets]))
    for preset in options.presets:
        with tarfile.open(options.output / f"{preset}.tar.gz", "w:gz") as packed:
            for kind in SWEEPS:
                for name in KEPT:
                    if (path := options.work / f"{kind}-{preset}" / name).exists():
                        packed.add(path, f"{kind}/{name}")


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Analyse a sweep in decode steps: each point and the loss that it saves of each reference."""
    tables = analyze_sweep(folder)
    return [
        {
            **{name: getattr(row, name) for name in STEP_COLUMNS},
            "saved": {name: tables.against(row, name).saved for name in STEP_REFERENCES},
        }
        for row in tables.points
    ]


def read_archive(path: Path) -> dict[str, Any]:
    """Analyse one model's two sweeps."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as packed:
            packed.extractall(folder, filter="data")
        return {
            "preset": path.name.removesuffix(".tar.gz"),
            "tokens": read_sweep(Path(folder) / "tokens"),
            "steps": read_steps(Path(folder) / "steps"),
        }


def render(models: Sequence[dict[str, Any]]) -> str:
    """Render both tables: rules per token, then rules on decode steps."""
    names = [model["preset"] for model in models]
    found = [at_budgets(model["tokens"]) for model in models]
    lines = [f"| experts | rule | {' | '.join(names)} |", f"|--:|:--|{'--:|' * len(names)}"]
    for at in by_loss(found[0]):
        cells = [_loss(rows.get(at)) for rows in found]
        lines.append(f"| {at[0]:g} | `{at[1]}` | {' | '.join(cells)} |")
    steps = [{(r["budget"], r["variant"]): r for r in model["steps"]} for model in models]
    lines += [
        "",
        f"| read | rule | {' | '.join(names)} |",
        f"|--:|:--|{'--:|' * len(names)}",
    ]
    for at, row in sorted(steps[0].items(), key=lambda item: (-item[0][0], item[1]["delta_nll"])):
        if row["rule"] in STEP_RULES:
            cells = [_step(rows.get(at)) for rows in steps]
            lines.append(f"| {100 * at[0]:.0f} % | `{at[1]}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _loss(row: dict[str, Any] | None) -> str:
    if row is None or row["delta_nll"] is None:
        return "–"
    saved = row["top_k_saved"]
    share = "–" if saved is None else f"{100 * saved:.0f} %"
    return f"{row['mean_experts']:.2f}; {100 * (row['perplexity_ratio'] - 1):+.1f} %; {share}"


def _step(row: dict[str, Any] | None) -> str:
    if row is None or row["delta_nll"] is None:
        return "–"
    saved = [row["saved"][name] for name in STEP_REFERENCES]
    shares = ", ".join("–" if s is None else f"{100 * s:.0f} %" for s in saved)
    distinct = row["mean_distinct_experts"]
    return f"{distinct:.1f}; {100 * (row['perplexity_ratio'] - 1):+.1f} %; {shares}"


def main() -> None:
    """Train, sweep, collect or render."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the models")
    training.add_argument("--corpus", type=Path, required=True, help="folder with text or pieces")
    training.add_argument("--call-seconds", type=float, default=560.0)
    training.add_argument("--scale", type=float, default=1.0, help="factor of the schedules")
    training.add_argument("--presets", nargs="+", choices=SECONDS, default=list(SECONDS))
    sweeping = commands.add_parser("sweep", help="sweep rules on the small models")
    sweeping.add_argument("--tokens", type=int, help="scored tokens; default: the whole text")
    sweeping.add_argument("--presets", nargs="+", choices=SECONDS, default=list(SWEPT))
    for command in (training, sweeping):
        command.add_argument("--work", type=Path, required=True, help="folder of the models")
        command.add_argument("--output", type=Path, required=True)
    collecting = commands.add_parser("collect", help="analyse the sweeps")
    collecting.add_argument("archives", type=Path, nargs="+")
    commands.add_parser("render", help="only render the JSON again")
    options = parser.parse_args()
    if options.command in ("train", "sweep"):
        train(options) if options.command == "train" else sweep(options)
        return
    kept = HERE / "other_families.json"
    if options.command == "collect":
        models = to_strict([read_archive(path) for path in options.archives])
        kept.write_text(json.dumps(models, indent=1) + "\n", encoding="utf-8")
    table = render(json.loads(kept.read_text(encoding="utf-8")))
    kept.with_suffix(".md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
