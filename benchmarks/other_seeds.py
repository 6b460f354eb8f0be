"""Test whether the ranking of rules holds on models trained from other seeds.

    python -m benchmarks.other_seeds train --corpus CORPUS --work FOLDER --output OUT --seeds 0 1 2
    python -m benchmarks.other_seeds collect OUT/seed-*.tar.gz
    python -m benchmarks.other_seeds render

`train` requires a GPU: it trains one model per seed with tools/train_demo.py, all concurrently,
then sweeps the rules over the packaged evaluation text in float32; seed 0 is the packaged model.
The others share its tokenizer and its corpus, or the part of it in CORPUS: `train.txt.xz` may be
truncated. Models are discarded; OUT contains the output of the sweeps.
`collect` analyses the sweeps and writes `other_seeds.json`, which `render` turns into
`other_seeds.md` and the table of docs/method.md.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
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

import numpy as np
from transformers import PreTrainedTokenizerFast

from benchmarks.wrong_drops import HERE, publish
from bh_routing.analysis import sweep_records
from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.sweep import SweepTables, compare_points
from bh_routing.analysis.sweep_records import PointRow
from bh_routing.demo import demo_folder
from bh_routing.results.files import to_strict
from tools.demo_corpus import END_OF_TEXT, encode

BUDGETS = (5.0, 4.0)
RULES = (
    "bh",
    "bh_drop",
    "bh_drop:scope=block",
    "contribution_threshold",
    "top_p",
    "min_p",
    "oracle_contribution",
)
KEPT = ("run.json", "quality.jsonl", "training.json", "log.txt")
PACKAGED = 0
"""Seed of the packaged model, which isn't retrained."""
MADE = ("bh_routing", "python", "torch", "transformers", "started_at")
COLUMNS = (
    *("rule", "variant", "budget", "knob", "mean_experts", "delta_nll", "delta_nll_low"),
    *("delta_nll_high", "perplexity_ratio", "tokens"),
)
COMPARED = ("at_mean", "difference", "low", "high", "p_corrected", "saved")
"""Columns of the comparison with static top-k."""


def read_documents(path: Path) -> list[str]:
    """Read the documents of an .xz file without the last one, since the file may be truncated."""
    text = lzma.LZMADecompressor().decompress(path.read_bytes()).decode("utf-8", "ignore")
    return [d.strip() for d in text.split(f"\n{END_OF_TEXT}\n")[:-1] if d.strip()]


def prepare(corpus: Path, work: Path, seeds: Sequence[int]) -> None:
    """Tokenize once, and store each seed's order of documents for training."""
    start = time.monotonic()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(demo_folder())
    documents = encode(tokenizer, read_documents(corpus / "train.txt.xz"))
    for seed in seeds:
        state = work / f"state-{seed}"
        tokenizer.save_pretrained(state / "tokenizer")
        order = np.random.default_rng(seed).permutation(len(documents))
        np.save(state / "tokens.npy", np.concatenate([documents[i] for i in order]))
    print(f"{len(documents):,} documents after {time.monotonic() - start:.0f} s", flush=True)


def train_and_sweep(options: argparse.Namespace, seed: int) -> None:
    """Train a model unless it is packaged, sweep it, and archive the files for `collect`."""
    model, swept = options.work / f"seed-{seed}", options.work / f"sweep-{seed}"
    with (options.work / f"seed-{seed}.log").open("w") as log:
        if seed == PACKAGED:
            model = demo_folder()
        else:
            trainer = (sys.executable, "-m", "tools.train_demo", "--corpus", options.corpus)
            places = ("--output", model, "--state", options.work / f"state-{seed}")
            clock = ("--total-seconds", str(options.seconds), "--seed", str(seed))
            subprocess.run([*trainer, *places, *clock], stdout=log, stderr=log, check=True)
        command = (sys.executable, "-m", "bh_routing", "sweep", "--model", model, "--no-fp16")
        what = ["--output", swept]
        what += [part for budget in BUDGETS for part in ("--budget", f"{budget:g}")]
        what += [part for rule in RULES for part in ("--rule", rule)]
        tokens = ("--tokens", str(options.tokens)) if options.tokens else ()
        done = subprocess.run([*command, *what, *tokens], stdout=log, stderr=log, check=False)
    print(f"seed {seed}: sweep ended with {done.returncode}", flush=True)
    if done.returncode:
        print(Path(log.name).read_text("utf-8")[-2000:], flush=True)
    shutil.copy(model / "training.json", swept)
    shutil.copy(log.name, swept / "log.txt")
    with tarfile.open(options.output / f"seed-{seed}.tar.gz", "w:gz") as packed:
        for name in KEPT:
            packed.add(swept / name, name)


def train(options: argparse.Namespace) -> int:
    """Prepare, then train and sweep all seeds concurrently."""
    options.output.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    others = [seed for seed in options.seeds if seed != PACKAGED]
    with ThreadPoolExecutor(len(options.seeds)) as pool:
        jobs = [pool.submit(train_and_sweep, options, s) for s in options.seeds if s == PACKAGED]
        prepare(options.corpus, options.work, others)
        jobs += [pool.submit(train_and_sweep, options, seed) for seed in others]
        for job in jobs:
            job.result()
    return 0


def read_seed(path: Path) -> dict[str, Any]:
    """Analyse one seed's sweep."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(path) as packed:
            packed.extractall(folder, filter="data")
        return read_sweep(Path(folder))


def read_sweep(folder: Path) -> dict[str, Any]:
    """Analyse a sweep whose folder contains its model's training record."""
    tables = compare_points(sweep_records.read_sweep(folder))
    training = json.loads((folder / "training.json").read_text("utf-8"))
    run = tables.sweep.run
    facts = ("tokens_seen", "corpus_tokens", "seconds", "heldout_nll", "device")
    return {
        "seed": training["recipe"]["seed"],
        "model": run["model"]["fingerprint"],
        "machine": run["model"]["device_name"],
        "made": {name: run["provenance"][name] for name in MADE},
        "text": run["text"],
        "training": {name: training[name] for name in facts},
        "rows": [row_of(tables, row) for row in tables.points],
    }


def row_of(tables: SweepTables, row: PointRow) -> dict[str, Any]:
    """Return a point and its comparison with static top-k."""
    compared = tables.against(row, STATIC)
    return {
        **{name: getattr(row, name) for name in COLUMNS},
        **{f"top_k_{name}": getattr(compared, name) for name in COMPARED},
        "top_k_domains": tables.domains_won(row, STATIC),
        "domains": len(tables.domain_names),
    }


def at_budgets(seed: dict[str, Any]) -> dict[tuple[float, str], dict[str, Any]]:
    """Return the rows of one seed at the budgets, by budget and variant."""
    rows = {(r["budget"], r["variant"] or r["rule"]): r for r in seed["rows"]}
    return {at: row for at, row in rows.items() if at[0] in BUDGETS}


def by_loss(rows: dict[tuple[float, str], dict[str, Any]]) -> list[tuple[float, str]]:
    """Sort by decreasing budget, then increasing loss."""
    return sorted(rows, key=lambda at: (-at[0], rows[at]["delta_nll"] or math.inf))


def render_first(seed: dict[str, Any]) -> str:
    """Render one seed's rules compared with static top-k and top-p at each rule's own mean."""
    rows = at_budgets(seed)
    lines = [
        "| budget | rule | mean experts | Δ perplexity, 95 % | saved | ΔNLL − static top-k's | "
        "domains won |",
        "|--:|:--|--:|--:|--:|--:|--:|",
    ]
    for budget, variant in by_loss(rows):
        row = rows[budget, variant]
        low, high = (100 * math.expm1(row[f"delta_nll_{end}"]) for end in ("low", "high"))
        cells = [
            f"{row['mean_experts']:.2f}",
            f"{100 * (row['perplexity_ratio'] - 1):+.1f} % ({low:.1f} to {high:.1f})",
            _saved(row),
            _difference(row),
            "–" if row["top_k_saved"] is None else f"{row['top_k_domains']} of {row['domains']}",
        ]
        lines.append(f"| {budget:g} | `{variant}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _saved(row: dict[str, Any]) -> str:
    if row["top_k_saved"] is None:
        return "–"
    return f"{100 * row['top_k_saved']:.0f} %" if row["top_k_saved"] > 0 else "none"


def _difference(row: dict[str, Any]) -> str:
    if row["top_k_difference"] is None:
        return "–"
    difference, low, high = (row[f"top_k_{name}"] for name in ("difference", "low", "high"))
    return f"{difference:+.3f} ({low:+.3f} to {high:+.3f})"


def render_all(seeds: Sequence[dict[str, Any]]) -> str:
    """Render rules by budget, with one column per seed, in the order of the first."""
    found = [at_budgets(seed) for seed in seeds]
    names = [f"seed {seed['seed']}" for seed in seeds]
    lines = [
        f"| budget | rule | {' | '.join(names)} |",
        f"|--:|:--|{'--:|' * len(names)}",
    ]
    for at in by_loss(found[0]):
        cells = [_cell(rows.get(at)) for rows in found]
        lines.append(f"| {at[0]:g} | `{at[1]}` | {' | '.join(cells)} |")
    facts = [
        f"seed {seed['seed']}: {seed['training']['tokens_seen'] / 1e6:,.0f} million tokens of "
        f"training, {seed['training']['heldout_nll']:.2f} nats a held-out token"
        for seed in seeds
    ]
    lines += ["", f"{'; '.join(facts)}."]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["delta_nll"] is None:
        return "–"
    return f"{row['mean_experts']:.2f}; {100 * (row['perplexity_ratio'] - 1):+.1f} %; {_saved(row)}"


def render(results: dict[str, Any]) -> str:
    """Render both tables as Markdown."""
    first = results["seeds"][0]
    return (
        f"The packaged model, {first['text']['tokens']:,} tokens, float32, {first['machine']}:\n\n"
        f"{render_first(first)}\n"
        "All seeds; each cell: mean experts, Δ perplexity, saved:\n\n"
        f"{render_all(results['seeds'])}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train, collect or render."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train and sweep")
    training.add_argument("--corpus", type=Path, required=True, help="folder with *.txt.xz")
    training.add_argument("--work", type=Path, required=True, help="folder for models and tokens")
    training.add_argument("--output", type=Path, required=True)
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    training.add_argument("--seconds", type=float, default=200.0, help="of training")
    training.add_argument("--tokens", type=int, default=None, help="to score; default: all")
    collecting = commands.add_parser("collect", help="analyse what `train` left")
    collecting.add_argument("packed", type=Path, nargs="+")
    commands.add_parser("render", help="only render the JSON again")
    options = parser.parse_args(argv)
    if options.command == "train":
        return train(options)
    page = HERE / "other_seeds.json"
    if options.command == "collect":
        results = {"rules": RULES, "seeds": [read_seed(path) for path in options.packed]}
        page.write_text(json.dumps(to_strict(results), indent=1) + "\n", encoding="utf-8")
    table = render(json.loads(page.read_text(encoding="utf-8")))
    publish("other_seeds", table, table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
