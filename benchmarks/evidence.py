"""Publish evidence of several models, each made by `bh-routing evidence`, in docs/evidence.md.

    python -m benchmarks.evidence packaged=FOLDER larger=FOLDER --training training.json

Copies each folder's tables to `evidence_tables/NAME.json`, and renders those of all models next to
each other between the markers of the page, and a sentence on them in README. FOLDER may be a folder
of `bh-routing evidence` or its evidence.json.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from bh_routing.analysis.evidence import read_evidence
from bh_routing.report.evidence import POPULATION, STEPS, matches, render_evidence
from bh_routing.report.text import percent
from bh_routing.results.files import read_json_object, render_json, write_atomically

HERE = Path(__file__).parent
STORED = HERE / "evidence_tables"
PAGE = HERE.parent / "docs" / "evidence.md"
CURVE = HERE.parent / "docs" / "images" / "evidence_training.png"
README = HERE.parent / "README.md"
BLOCK = re.compile(r"(<!-- evidence: .*? -->\n).*(<!-- evidence: end -->)", re.DOTALL)


def stored() -> dict[str, dict[str, Any]]:
    """Return the published evidence by name, the packaged model's first."""
    files = sorted(STORED.glob("*.json"), key=lambda file: (file.stem != "packaged", file.stem))
    return {file.stem: read_json_object(file) for file in files}


def render(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Render the block of docs/evidence.md."""
    text = re.sub(r"^## ", "### ", render_evidence(models), flags=re.MULTILINE)
    if CURVE.exists():
        text += (
            "\n### Training\n\n![Loss of the larger model on training text and on held-out text, "
            f"against trained tokens](images/{CURVE.name})\n"
        )
    return text


def summarize(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Return README's paragraph: what the two main rules save on every model."""
    by_token = [
        f"{' and '.join(_saved(found, 'equal_cost', POPULATION, k) for k in (5, 4))} ({name})"
        for name, found in models.items()
    ]
    by_step = [
        f"{_saved(found, 'decode_steps', STEPS, 0.65, 'oea')} ({name})"
        for name, found in models.items()
    ]
    text = (
        "Of static top-k's increase in perplexity at 5 and 4 of 8 experts per token, population BH "
        f"saves {', '.join(by_token)}; of OEA's at 65 % of the reads of a step of 16, refilled "
        f"`bh_drop` saves {', '.join(by_step)}."
    )
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n"


def _saved(
    found: Mapping[str, Any], part: str, variant: str, budget: float, reference: str = "top_k"
) -> str:
    """Return the fraction of a reference's loss that a rule saves at a budget."""
    rows = (
        row["saved"]
        for row in found.get(part, {"comparisons": []})["comparisons"]
        if matches(row["variant"], variant)
        and (row["reference"], row["budget"]) == (reference, budget)
    )
    return percent(next(rows, None))


def draw_loss_curve(training: Mapping[str, Any], path: Path) -> None:
    """Draw the loss on training text, as a running mean, and on held-out text."""
    rows = pd.DataFrame(training["curve"])
    million = rows["tokens"] / 1e6
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    smooth = rows["train_nll"].rolling(max(1, len(rows) // 50), min_periods=1).mean()
    axes.plot(million, smooth, color="#4477aa", label="training text, running mean")
    if "heldout_nll" in rows:
        heldout = rows["heldout_nll"].dropna()
        axes.plot(
            million[heldout.index], heldout, "o-", ms=3, color="#cc6633", label="held-out text"
        )
    lowest = min(smooth.min(), training["heldout_nll"])
    axes.set(
        xlabel="training tokens (millions)",
        ylabel="negative log-likelihood (nats per token)",
        ylim=(lowest - 0.1, smooth[million >= million.iloc[-1] / 20].max()),
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _replace(page: Path, block: str) -> None:
    text = page.read_text(encoding="utf-8")
    page.write_text(BLOCK.sub(lambda found: found[1] + block + found[2], text), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Store the evidence and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--training", type=Path, help="training.json of the larger model")
    options = parser.parse_args(argv)
    for named in options.models:
        name, _, path = named.partition("=")
        content = render_json(read_evidence(Path(path)))
        STORED.mkdir(exist_ok=True)
        write_atomically(STORED / f"{name}.json", content)
    if options.training is not None:
        draw_loss_curve(read_json_object(options.training), CURVE)
    for page, block in ((PAGE, render(stored())), (README, summarize(stored()))):
        _replace(page, block)


if __name__ == "__main__":
    main()
