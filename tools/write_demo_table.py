"""Write the table and images of docs/results.md from a finished run of the demo model.

make demo
python tools/write_demo_table.py results   # stores its numbers in benchmarks/demo_run.json
python tools/write_demo_table.py --check   # fails if the table doesn't match those numbers

The chart and a screenshot of report.html go to docs/images/; `--pictures` updates only these.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from bh_routing.results.records import PLOTS, REPORT_HTML, RUN_JSON, SUMMARY_JSON

ROOT = Path(__file__).resolve().parents[1]
QUALITY_PLOT = "quality_vs_experts.png"
KEPT = ROOT / "benchmarks" / "demo_run.json"
PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- demo-table -->\n", "<!-- /demo-table -->"


def keep(results: Path) -> None:
    """Store the numbers behind the table, and the machine that measured them."""
    summary, run = (json.loads((results / name).read_text()) for name in (SUMMARY_JSON, RUN_JSON))
    rules = [
        {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        for row in summary["quality"]["rules"]
    ]
    kept = {name: run[name] for name in ("provenance", "timing", "calibration")}
    kept |= {"configs": list(run["spec"]["configs"]), "rules": rules, "speed": summary["speed"]}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def keep_pictures(results: Path) -> None:
    """Copy the chart of quality against experts; take a screenshot of the report's token view."""
    IMAGES.mkdir(exist_ok=True)
    shutil.copy(results / PLOTS / QUALITY_PLOT, IMAGES / QUALITY_PLOT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        page.goto((results / REPORT_HTML).resolve().as_uri())
        page.select_option("#token-choice [name=config]", label="bh_loose")
        page.select_option("#token-choice [name=prompt]", index=1)
        page.locator("#tokens").screenshot(path=IMAGES / "report.png")
        browser.close()


def render(kept: dict[str, Any]) -> str:
    """Return the table of experts used and quality lost, for BH and static top-k."""
    rows = [row for row in kept["rules"] if not row["is_reference"]]
    static = [row for row in rows if row["rule"] == "top_k"]
    ours = [row for row in rows if row["config_name"] in kept["configs"]]
    lines = ["| rule | experts per token | perplexity | 95 % interval |", "|:--|--:|--:|--:|"]
    for row in sorted(rows, key=lambda row: -row["mean_experts"]):
        name = f"`{row['config_name']}`" + (" (static)" if row in static else "")
        low, high = row["perplexity_ratio_low"], row["perplexity_ratio_high"]
        lines.append(
            f"| {name} | {row['mean_experts']:.2f} | {_percent(row['perplexity_ratio'])} | "
            f"{_percent(low)} to {_percent(high)} |"
        )
    any_row = rows[0]
    lines += ["", _verdict(ours, static), ""]
    lines.append(
        f"From `make demo`: perplexity against the model's own top-8 on {any_row['tokens']:,} "
        f"held-out tokens of {any_row['documents']} documents, intervals over documents. The demo "
        "model is tiny (10.9 million parameters); a large model's numbers will differ."
    )
    return "\n".join(lines) + "\n"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f} %"


def _verdict(ours: list[dict[str, Any]], static: list[dict[str, Any]]) -> str:
    """Compare each rule with the static rules that use no more experts."""
    beaten = [
        row["config_name"]
        for row in ours
        if any(
            other["mean_experts"] <= row["mean_experts"]
            and other["perplexity_ratio_high"] < row["perplexity_ratio_low"]
            for other in static
        )
    ]
    names = ", ".join(f"`{name}`" for name in beaten)
    if len(beaten) == len(ours):
        return (
            "**Every BH configuration has a higher perplexity than a static top-k with fewer "
            "experts**; their intervals don't overlap."
        )
    if beaten:
        return (
            f"**A static top-k with fewer experts has a lower perplexity than** {names}; their "
            "intervals don't overlap."
        )
    return "No BH configuration has clearly a higher perplexity than a static top-k with as few."


def replace_block(page: str, block: str) -> str:
    """Return the page with its table replaced."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + block + END + rest.split(END, 1)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", type=Path, nargs="?", help="folder that `make demo` wrote")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pictures", action="store_true", help="renew the pictures alone")
    args = parser.parse_args()
    if args.results is not None:
        keep_pictures(args.results)
        if args.pictures:
            return 0
        keep(args.results)
    wanted = replace_block(PAGE.read_text(), render(json.loads(KEPT.read_text())))
    if args.check:
        return int(wanted != PAGE.read_text())
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
