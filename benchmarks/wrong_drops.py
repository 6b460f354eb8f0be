"""Measure how often a dropped slot mattered, for the alphas of docs/method.md on held-out text.

    python -m benchmarks.wrong_drops --device cuda    # measure
    python -m benchmarks.wrong_drops --render         # only render the stored results

`bh_routing.experiments.wrong_drops` judges the drops.

Writes `wrong_drops.json`, and renders it to `wrong_drops.md` and docs/method.md, between the
markers.
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

import torch
import transformers

import bh_routing
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, tokenize_documents
from bh_routing.experiments.wrong_drops import judge_rules
from bh_routing.models import load_model
from bh_routing.models.load import DeviceName
from bh_routing.nulls import Calibration

DOMAINS = ("textbook", "fiction", "documentation")
CALIBRATION_TOKENS = 16_384
HERE = Path(__file__).parent
METHOD = HERE.parent / "docs" / "method.md"


def made(model: Any, calibration: Calibration, text: Sequence[TokenizedDocument]) -> dict[str, Any]:
    """Return the provenance of the numbers."""
    on_cuda = model.device.type == "cuda"
    return {
        "model": calibration.model_fingerprint,
        "calibration_tokens": calibration.num_tokens,
        "tokens": sum(len(document.ids) for document in text),
        "clusters": len({document.cluster for document in text}),
        "bh_routing": bh_routing.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "machine": torch.cuda.get_device_name()
        if on_cuda
        else f"{platform.system()} {platform.machine()}, CPU",
        "date": datetime.now(UTC).date().isoformat(),
    }


def footer(results: dict[str, Any]) -> str:
    """Return one line on the provenance of a table."""
    facts = results["made"]
    return (
        f"{facts['tokens']:,} tokens, {facts['clusters']} clusters of documents; "
        f"{facts['dtype']}, {facts['machine']}, torch {facts['torch']}, {facts['date']}."
    )


def percent(value: dict[str, float | None]) -> str:
    """Format a fraction with its interval, in percent."""
    estimate, low, high = value["estimate"], value["low"], value["high"]
    if estimate is None:
        return "–"
    interval = f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high else ""
    return f"{100 * estimate:.1f} %{interval}"


def render(results: dict[str, Any], only: str = "") -> str:
    """Render variants whose name contains `only` as Markdown, one row per variant and alpha."""
    rows = {(r["variant"], r["alpha"], r["domain"]): r for r in results["rows"]}
    lines = [
        "| variant | α | mean experts | α·π₀ | mean per token | mean per block | pooled | "
        + " | ".join(f"{domain}, mean per token" for domain in DOMAINS)
        + " |",
        "|:--|--:|--:|--:|--:|--:|--:|" + "--:|" * len(DOMAINS),
    ]
    for (variant, alpha, domain), row in rows.items():
        if domain != "all" or only not in variant:
            continue
        is_drop = variant.startswith("bh_drop")
        bound = f"{100 * alpha * row['share_mattered']:.1f} %" if is_drop else "–"
        cells = [variant, f"{alpha:.2f}", f"{row['mean_experts']:.2f}", bound]
        cells += [percent(row["per_token"])]
        cells += [percent(row["per_block"]) if " block," in variant else "–"]
        cells += [percent(row["pooled"])]
        cells += [percent(rows[variant, alpha, d]["per_token"]) for d in DOMAINS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", footer(results)]) + "\n"


def save(results: dict[str, Any], path: Path) -> None:
    """Write JSON with one line per row of each table."""
    parts = []
    for name, value in results.items():
        rows = value if isinstance(value, list) else None
        body = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]" if rows else json.dumps(value)
        parts.append(f"{json.dumps(name)}: {body}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def publish(name: str, table: str, excerpt: str, page: Path = METHOD) -> None:
    """Write a table next to its JSON, and an excerpt between its markers on a page of docs/."""
    (HERE / f"{name}.md").write_text(table, encoding="utf-8")
    block = re.compile(rf"(<!-- {name}: .*? -->\n).*(<!-- {name}: end -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    page.write_text(block.sub(lambda m: m[1] + excerpt + m[2], text), encoding="utf-8")


def measure(device: DeviceName, tokens: int | None) -> dict[str, Any]:
    """Calibrate, judge every rule, and describe every rule on every domain."""
    start = time.perf_counter()
    model, tokenizer = load_model("demo", device=device, dtype="float32")
    calibration = calibrate(
        model,
        tokenizer,
        [document.text for document in packaged_documents("calibration")],
        nulls=("background", "needed_by_loss"),
        max_tokens=CALIBRATION_TOKENS,
    )
    text = tokenize_documents(tokenizer, packaged_documents("evaluation"), tokens)
    rows = judge_rules(model, text, calibration)
    print(f"judged {len(rows)} rows after {time.perf_counter() - start:.0f} s", flush=True)
    return {"made": made(model, calibration, text), "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or read stored results, and render them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=None, help="evaluation tokens; default: all")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--render", action="store_true", help="only render the JSON again")
    parser.add_argument("--output", type=Path, default=HERE / "wrong_drops.json")
    options = parser.parse_args(argv)
    if not options.render:
        results = measure(options.device, options.tokens)
        save(results, options.output)
    results = json.loads(options.output.read_text(encoding="utf-8"))
    if options.output.parent == HERE:
        publish("wrong_drops", render(results), render(results, "sensitivity, norm"))
    else:
        print(render(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
