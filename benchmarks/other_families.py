"""Compare rules on models whose routers don't weigh as OLMoE's do, and on a larger model.

    python -m benchmarks.other_families train --corpus PIECES --work FOLDER --output OUT
    python -m benchmarks.other_families sweep --work FOLDER --output OUT
    python -m benchmarks.other_families collect OUT/renormalised.tar.gz OUT/sigmoid.tar.gz
    python -m benchmarks.other_families render

`train` requires a GPU: it trains the presets of tools/train_demo.py concurrently, and leaves their
training records and logs in OUT; the same command continues a training that the end of its call
interrupted. `sweep` sweeps the rules on the small models, per token over the packaged evaluation
text and in decode steps of 16 sequences, all concurrently. `collect` analyses both kinds of sweeps
and writes `other_families.json`, which `render` turns into `other_families.md` and the tables of
docs/evidence.md.
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

from benchmarks.other_seeds import BUDGETS, KEPT
from benchmarks.wrong_drops import HERE, publish
from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.sweep import SweepTables, compare_points
from bh_routing.analysis.sweep_records import read_sweep
from bh_routing.report.text import as_float, loss_percent, number, percent
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
        *(part for budget in BUDGETS for part in ("--budget", f"{budget:g}")),
        *(part for rule in RULES for part in ("--rule", rule)),
    ],
    "steps": [
        *("--cost", "distinct", "--decode-batch", "16", "--tokens", "20000"),
        *("--budget", "0.75", "--budget", "0.65"),
    ],
}
NAMES = {"top_k": "static top-k", "top_p": "top-p", "oea": "OEA"}
REFERENCES = {"tokens": ("top_k", "top_p"), "steps": ("top_k", "oea")}
FACTS = ("tokens_seen", "corpus_tokens", "seconds", "heldout_nll", "device")
POINT = (
    *("rule", "variant", "budget", "mean_experts", "delta_nll", "delta_nll_low"),
    *("delta_nll_high", "perplexity_ratio", "tokens"),
)
COMPARED = ("answer", "saved", "saved_low", "saved_high", "p_corrected")


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


def read_archive(path: Path) -> dict[str, Any]:
    """Analyse one model's two sweeps: each point, and its comparison with each reference."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as packed:
            packed.extractall(folder, filter="data")
        swept = {kind: compare_points(read_sweep(Path(folder) / kind)) for kind in SWEEPS}
        training = json.loads((Path(folder) / "tokens" / "training.json").read_text("utf-8"))
    run = swept["tokens"].sweep.run
    return {
        "preset": path.name.removesuffix(".tar.gz"),
        "model": run["model"],
        "provenance": run["provenance"],
        "training": {name: training[name] for name in FACTS},
        **{kind: rows_of(tables, REFERENCES[kind]) for kind, tables in swept.items()},
    }


def rows_of(tables: SweepTables, references: Sequence[str]) -> list[dict[str, Any]]:
    """Return the points of a sweep at its budgets with their comparisons."""
    return [
        {
            **{name: getattr(row, name) for name in POINT},
            "cost": row.cost,
            "against": {
                name: {column: getattr(found, column) for column in COMPARED}
                for name in references
                if (found := tables.against(row, name)).answer != "unknown"
            },
        }
        for row in tables.points
        if not row.is_curve_only and (row.variant or row.cost in BUDGETS)
    ]


def render(models: Sequence[dict[str, Any]]) -> str:
    """Render both tables: rules per token, then rules on decode steps."""
    tables = []
    for kind, first in (("tokens", "experts"), ("steps", "reads")):
        names = [f"{NAMES[name]}'s" for name in REFERENCES[kind]]
        heads = [
            f"{model['preset']}: {cell}"
            for model in models
            for cell in ("Δ perplexity", f"saved of {names[0]}", f"of {names[1]}")
        ]
        lines = [f"| {first} | rule | {' | '.join(heads)} |", f"|--:|:--|{'--:|' * len(heads)}"]
        found = [{_key(kind, row): row for row in model[kind]} for model in models]
        order = sorted(found[0], key=lambda at: (-at[0], as_float(found[0][at]["delta_nll"])))
        for at in order:
            budget = f"{at[0]:g}" if kind == "tokens" else percent(at[0])
            cells = [cell for rows in found for cell in _cells(rows.get(at), REFERENCES[kind])]
            lines.append(f"| {budget} | `{at[1]}` | {' | '.join(cells)} |")
        tables.append("\n".join(lines) + "\n")
    facts = [
        f"{model['preset']}: {model['training']['tokens_seen'] / 1e6:,.0f} million tokens, "
        f"{model['training']['heldout_nll']:.2f} nats per held-out token"
        for model in models
    ]
    return "\n".join([f"Training: {'; '.join(facts)}.\n", *tables])


def _key(kind: str, row: dict[str, Any]) -> tuple[float, str]:
    """Return a row's budget and name; static top-k has a whole number of experts per token."""
    if row["rule"] == STATIC:
        return row["mean_experts"], STATIC
    return row["budget"], row["variant"]


def _cells(row: dict[str, Any] | None, references: Sequence[str]) -> list[str]:
    if row is None or row["delta_nll"] is None:
        return ["–"] * (1 + len(references))
    saved = (_saved(row["against"].get(name)) for name in references)
    return [loss_percent(row["perplexity_ratio"]), *saved]


def _saved(found: dict[str, Any] | None) -> str:
    """Return the fraction of a reference's loss that is saved, with its joint interval."""
    if found is None:
        return "–"
    ends = ", ".join(number(100 * found[name], 0) for name in ("saved_low", "saved_high"))
    shown = f"{percent(found['saved'])} [{ends}]"
    return shown if found["answer"] == "yes" else f"{shown} ({found['answer']})"


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
    publish(kept.stem, table, table, HERE.parent / "docs" / "evidence.md")


if __name__ == "__main__":
    main()
