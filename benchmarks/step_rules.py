"""Compare rules for decode steps at equal distinct experts, at several batch sizes.

    python -m benchmarks.step_rules --output FOLDER
    python -m benchmarks.step_rules --output FOLDER --device cuda --model PATH --tokens 20000

For each batch size, `bh-routing sweep --cost distinct` runs into its own folder, and resumes there;
`step_rules.json` and `step_rules.md` in the output hold every comparison, with the rule's increase
in perplexity as a fraction of the reference's at the same reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from bh_routing.analysis.sweep import ALL_DOMAINS, analyze_sweep
from bh_routing.experiments.specs import SweepSpec, make_spec
from bh_routing.experiments.sweep import sweep
from bh_routing.report.sweep import conclude_sweep

COLUMNS = ["config_name", "rule", "variant", "budget", "reference", "difference", "low", "high",
           "p_corrected", "answer", "ratio", "ratio_low", "ratio_high"]  # fmt: skip


def compare(folder: Path, batch: int) -> pd.DataFrame:
    """Return the comparisons of one sweep on the whole text."""
    compared = analyze_sweep(folder).comparisons
    compared = compared[compared["domain"] == ALL_DOMAINS]
    ratios = {
        "ratio": 1 - compared["saved"],
        "ratio_low": 1 - compared["saved_high"],
        "ratio_high": 1 - compared["saved_low"],
    }
    return compared.assign(**ratios)[COLUMNS].assign(decode_batch=batch)


def main() -> None:
    """Sweep, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.65])
    parser.add_argument("--tokens", type=int, help="scored tokens; default: the whole text")
    options = parser.parse_args()
    tables = []
    for batch in options.batches:
        folder = options.output / f"batch-{batch}"
        spec = make_spec(
            SweepSpec, model=options.model, device=options.device, dtype="float32", output=folder,
            cost="distinct", decode_batch=batch, budgets=options.budgets, tokens=options.tokens,
        )  # fmt: skip
        sweep(spec)
        conclude_sweep(folder)
        tables.append(compare(folder, batch))
    found = pd.concat(tables, ignore_index=True)
    found.to_json(options.output / "step_rules.json", orient="records", indent=1)
    lines = ["| " + " | ".join(map(str, found)) + " |", "|" + "--|" * len(found.columns)]
    for row in found.to_numpy():
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
        lines.append("| " + " | ".join(cells) + " |")
    (options.output / "step_rules.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
