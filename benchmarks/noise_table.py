"""What every null selects where there is nothing to select: the all-noise table of docs/method.md.

    python benchmarks/noise_table.py                  # noise only
    python benchmarks/noise_table.py --model demo     # and the same nulls on real text

Writes `noise_table.json`, renders it to `noise_table.md` and into docs/method.md, between the
markers. Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

import bh_routing
from bh_routing.engine import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.models import find_routers, load_model
from bh_routing.multitest.step_up import ranks
from bh_routing.nulls import NULLS, Calibration, count_at_cut_offs, cut_offs, noise_control

ALPHAS = (0.01, 0.05, 0.10)
NUM_EXPERTS = 64
MODEL_TOP_K = 8
SEEDS = (0, 1, 2, 3, 4)
TEXT_TOKENS = 8_192
HERE = Path(__file__).parent
METHOD = HERE.parent / "docs" / "method.md"
BLOCK = re.compile(r"(<!-- noise table: .*? -->\n).*(<!-- noise table: end -->)", re.DOTALL)


def measure_noise(tokens: int) -> list[dict[str, Any]]:
    """Run every null on noise, with several seeds to show what the table's own draw costs."""
    rows = []
    for name, null in NULLS.items():
        runs = [
            noise_control(
                name,
                alphas=ALPHAS,
                num_experts=NUM_EXPERTS,
                model_top_k=MODEL_TOP_K,
                tokens=tokens,
                seed=seed,
            )
            for seed in SEEDS
        ]
        for results in zip(*runs, strict=True):
            first = results[0]
            rows.append(
                {
                    "null": name,
                    "alpha_is": null.alpha_is,
                    "alpha": first.alpha,
                    "mean_experts": first.mean_experts,
                    "mean_experts_lowest_seed": min(result.mean_experts for result in results),
                    "mean_experts_highest_seed": max(result.mean_experts for result in results),
                    "mean_rejected": first.mean_rejected,
                    "share_any": first.share_any,
                    "share_any_low": first.share_any_low,
                    "share_any_high": first.share_any_high,
                }
            )
    return rows


def measure_text(model_name: str) -> dict[str, Any]:
    """Run every null on held-out text: calibrated on one split, counted on the other."""
    model, tokenizer = load_model(model_name, device="cpu", dtype="float32")
    texts = [document.text for document in packaged_documents("calibration")]
    tabled = [name for name, null in NULLS.items() if null.needs_table]
    calibration = calibrate(model, tokenizer, texts, nulls=tabled)
    logits_LTE = collect_logits(model, tokenizer)
    rows = [
        {"null": name, "alpha": alpha, **count_on_text(name, alpha, logits_LTE, calibration)}
        for name in NULLS
        for alpha in ALPHAS
    ]
    return {
        "model": model_name,
        "model_fingerprint": calibration.model_fingerprint,
        "calibration_tokens": calibration.num_tokens,
        "tokens": int(logits_LTE.shape[1]),
        "layers": int(logits_LTE.shape[0]),
        "top_k_mass_temperature_1": top_k_mass(logits_LTE, calibration.model_top_k, 1.0),
        "top_k_mass_temperature_2": top_k_mass(logits_LTE, calibration.model_top_k, 2.0),
        "rows": rows,
    }


def collect_logits(model: Any, tokenizer: Any) -> Tensor:
    """Read the start of every evaluation document and return its logits, shape (L, T, E)."""
    routers = find_routers(model)
    seen: list[list[Tensor]] = [[] for _ in routers.sites]

    def keep(layer: int) -> Callable[[Any, Any, tuple[Tensor, ...]], None]:
        return lambda _, __, output: seen[layer].append(output[0].float())

    handles = [site.module.register_forward_hook(keep(site.layer)) for site in routers.sites]
    documents = packaged_documents("evaluation")
    share = TEXT_TOKENS // len(documents)
    with torch.inference_mode():
        for document in documents:
            ids = tokenizer(document.text, verbose=False)["input_ids"][:share]
            model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(layer) for layer in seen])


def top_k_mass(logits_LTE: Tensor, k: int, temperature: float) -> float:
    """Mean sum of the top-k probabilities at a temperature."""
    probabilities_LTE = (logits_LTE / temperature).softmax(dim=-1)
    return float(probabilities_LTE.topk(k, dim=-1).values.sum(dim=-1).mean())


def count_on_text(
    name: str, alpha: float, logits_LTE: Tensor, calibration: Calibration
) -> dict[str, float]:
    """Mean experts over tokens and layers, and the share of them with any rejection."""
    null, num_experts = NULLS[name], calibration.num_experts
    rank_E = ranks(num_experts, logits_LTE.device)
    counts = []
    for layer, logits_TE in enumerate(logits_LTE):
        table = calibration.table(name, layer) if null.needs_table else None
        cut_offs_E = cut_offs(null, alpha, num_experts, table)
        scores_TE = null.descending_scores(logits_TE)
        counts.append(count_at_cut_offs(scores_TE, cut_offs_E, rank_E))
    counts_LT = torch.cat(counts, dim=-1).double()
    return {
        "mean_experts": float(counts_LT.clamp(1, calibration.model_top_k).mean()),
        "share_any": float((counts_LT > 0).double().mean()),
    }


def render(results: dict[str, Any]) -> str:
    """Render the table in Markdown."""
    text = {(row["null"], row["alpha"]): row for row in results["text"].get("rows", [])}
    lines = [
        "| null | its α is | α | experts on noise | (5 seeds) | rejected on noise | tokens with "
        "any rejection on noise, 95 % interval | experts on text | tokens with any on text |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["noise"]:
        on_text = text.get((row["null"], row["alpha"]))
        experts = f"{on_text['mean_experts']:.2f}" if on_text else "not run"
        share = f"{100 * on_text['share_any']:.1f} %" if on_text else "not run"
        lines.append(
            f"| `{row['null']}` | {row['alpha_is']} | {row['alpha']:.2f} "
            f"| {row['mean_experts']:.2f} | {row['mean_experts_lowest_seed']:.2f} to "
            f"{row['mean_experts_highest_seed']:.2f} | {row['mean_rejected']:.2f} "
            f"| {100 * row['share_any']:.1f} % ({100 * row['share_any_low']:.1f} to "
            f"{100 * row['share_any_high']:.1f}) | {experts} | {share} |"
        )
    made = results["made"]
    lines += [
        "",
        f"Noise: {made['num_experts']} experts, top-{made['model_top_k']}, {made['tokens']:,} "
        f"fresh tokens, seed {made['seeds'][0]} unless said otherwise; torch {made['torch']}, "
        f"numpy {made['numpy']}, scipy {made['scipy']}, {made['machine']}, {made['date']}.",
    ]
    if results["text"]:
        on = results["text"]
        lines.append(
            f"Text: model `{on['model']}` ({on['model_fingerprint'][:12]}), {on['layers']} layers, "
            f"tables from {on['calibration_tokens']:,} tokens of the packaged calibration text, "
            f"counted on {on['tokens']:,} tokens of the packaged evaluation text. The top-k "
            f"probabilities there sum to {on['top_k_mass_temperature_1']:.2f} on average, at "
            f"temperature 2 to {on['top_k_mass_temperature_2']:.2f}."
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the JSON, and render it into both Markdown files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000, help="tokens of fresh noise")
    parser.add_argument("--model", help="also measure on text with this model, such as demo")
    options = parser.parse_args(argv)
    results = {
        "made": {
            "num_experts": NUM_EXPERTS,
            "model_top_k": MODEL_TOP_K,
            "tokens": options.tokens,
            "seeds": SEEDS,
            "bh_routing": bh_routing.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "machine": f"{platform.system()} {platform.machine()}, CPU",
            "date": datetime.now(UTC).date().isoformat(),
        },
        "noise": measure_noise(options.tokens),
        "text": measure_text(options.model) if options.model else {},
    }
    written = json.dumps(results, indent=1) + "\n"
    (HERE / "noise_table.json").write_text(written, encoding="utf-8")
    table = render(json.loads(written))
    (HERE / "noise_table.md").write_text(table, encoding="utf-8")
    page = METHOD.read_text(encoding="utf-8")
    METHOD.write_text(BLOCK.sub(lambda found: found[1] + table + found[2], page), encoding="utf-8")
    print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
