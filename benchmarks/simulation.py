"""Measure false discoveries and power in the simulation with planted signals of docs/method.md.

    python benchmarks/simulation.py

Writes the results as JSON next to this file, renders them to Markdown there and in docs/method.md,
between the markers.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import bh_routing
from bh_routing.nulls.simulation import run_simulation

HERE = Path(__file__).parent
METHOD = HERE.parent / "docs" / "method.md"
BLOCK = re.compile(r"(<!-- simulation: .*? -->\n).*(<!-- simulation: end -->)", re.DOTALL)


def render(results: dict[str, Any]) -> str:
    """Render the rows as Markdown."""
    lines = [
        "| design | null | procedure | α | mean share false (95 %) | pooled share false | power | "
        "rejected | any on noise (95 %) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        pooled = "–" if row["pooled_share"] is None else f"{row['pooled_share']:.3f}"
        lines.append(
            f"| {row['design']} | `{row['null']}` | {row['procedure']} | {row['alpha']:.2f} | "
            f"{row['fdr']:.3f} ({row['fdr_low']:.3f} to {row['fdr_high']:.3f}) | {pooled} | "
            f"{row['power']:.2f} | {row['mean_rejected']:.2f} | {row['noise_share_any']:.3f} "
            f"({row['noise_low']:.3f} to {row['noise_high']:.3f}) |"
        )
    made = results["made"]
    lines += [
        "",
        f"{made['tokens']:,} tokens a cell, seed {made['seed']}; torch {made['torch']}, "
        f"{made['machine']}, {made['date']}.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the JSON, and render it to both Markdown files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rows = [asdict(row) for row in run_simulation(options.tokens, options.seed)]
    for row in rows:
        if row["pooled_share"] != row["pooled_share"]:
            row["pooled_share"] = None  # JSON has no NaN
    results = {
        "made": {
            "tokens": options.tokens,
            "seed": options.seed,
            "bh_routing": bh_routing.__version__,
            "torch": torch.__version__,
            "machine": f"{platform.system()} {platform.machine()}, CPU",
            "date": datetime.now(UTC).date().isoformat(),
        },
        "rows": rows,
    }
    (HERE / "simulation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = render(results)
    (HERE / "simulation.md").write_text(table, encoding="utf-8")
    page = METHOD.read_text(encoding="utf-8")
    METHOD.write_text(BLOCK.sub(lambda found: found[1] + table + found[2], page), encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
