"""Count the experts that rules select from pure noise: the all-noise table of docs/method.md.

    python benchmarks/noise_table.py                  # noise only
    python benchmarks/noise_table.py --model demo     # also on real text

Writes `noise_table.json`, and renders it to `noise_table.md` and docs/method.md, between the
markers. Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import scipy
import torch
from torch import Tensor

import bh_routing
from bh_routing.engine import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.models import find_routers, load_model
from bh_routing.multitest import benjamini_hochberg
from bh_routing.nulls import NULLS, Calibration
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.contributions import Contributions
from bh_routing.rules import (
    BenjaminiHochberg,
    BenjaminiHochbergDrop,
    Candidates,
    LayerContext,
    noise_control,
)
from bh_routing.rules.noise import FIT_TOKENS, fraction_with_interval

ALPHAS = (0.01, 0.05, 0.10)
DROP_ALPHAS = (0.01, 0.05, 0.10, 0.30)
NUM_EXPERTS = 64
MODEL_TOP_K = 8
SEEDS = (0, 1, 2, 3, 4)
TEXT_TOKENS = 8_192
FIT_TOKENS_BY_EXPERT = 49_152
"""Tokens for per-expert tables, to which each token contributes one score instead of E."""
DROPPED = ("share", "low", "high")
HERE = Path(__file__).parent
METHOD = HERE.parent / "docs" / "method.md"
BLOCK = re.compile(r"(<!-- noise table: .*? -->\n).*(<!-- noise table: end -->)", re.DOTALL)
DROP_BLOCK = re.compile(r"(<!-- drop noise: .*? -->\n).*(<!-- drop noise: end -->)", re.DOTALL)


Mattered = Literal["by chance", "by contribution"]
"""by chance: half of the slots, drawn independently of their weights. by contribution: those whose
weight times an output norm is above the median, as "needed" defines it, with independent random
norms."""

NORM_SPREAD: Final = 0.5
"""Standard deviation of the logarithm of an output norm."""


def measure_noise(tokens: int) -> list[dict[str, Any]]:
    """Run every null distribution on noise, with several seeds to show the table's variance."""
    rows = []
    for name, null in NULLS.items():
        runs = [
            noise_control(
                [BenjaminiHochberg(alpha, null=name) for alpha in ALPHAS],
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DropNoiseResult:
    """Slots of noise that BH over a token's slots drops at one alpha."""

    mattered: Mattered
    alpha: float
    tokens: int
    mean_kept: float
    """Mean number of slots kept per token, at least 1."""
    dropped: tuple[float, float, float]
    """Fraction of tokens with any drop, and its Wilson 95 % interval."""
    false_share: float
    """Mean over tokens of the fraction of dropped slots that mattered; 0 if none is dropped."""
    false_low: float
    """95 % interval over tokens, by normal approximation."""
    false_high: float


def drop_noise_control(
    *,
    alphas: Sequence[float],
    num_experts: int,
    model_top_k: int,
    tokens: int = 10_000,
    seed: int = 0,
) -> list[DropNoiseResult]:
    """Run the rule `bh_drop` by token on router logits that are independent N(0, 1).

    The statistic is the routing weight: all scales are equal. If slots matter by chance, all slots
    have the score distribution of those that matter, so all null hypotheses are true: if the slots
    of a token were independent, or PRDS, at most a fraction alpha of tokens would have any drop.

    Args:
        alphas: levels, each in (0, 1).
        num_experts: E.
        model_top_k: slots per token.
        tokens: tokens of fresh noise.
        seed: seed of all draws.
    Returns:
        One result per definition of mattering and alpha.
    """
    results = []
    for mattered in get_args(Mattered):
        generator = torch.Generator().manual_seed(seed)
        fit, fit_matters = _draw(FIT_TOKENS, num_experts, model_top_k, mattered, generator)
        fresh, matters = _draw(tokens, num_experts, model_top_k, mattered, generator)
        needed = ReferenceTable.from_scores(fit.top_k_weights_TK[fit_matters])
        context = LayerContext(
            layer=0,
            num_experts=num_experts,
            model_top_k=model_top_k,
            device=torch.device("cpu"),
            contributions=Contributions(
                residual_norms_L=torch.ones(1),
                scales={"weight": torch.ones(1, num_experts)},
                all_scores={},
                needed_scores={("weight", "norm"): needed},
            ),
        )
        for alpha in alphas:
            keep_TK = BenjaminiHochbergDrop(alpha, statistic="weight").bind(context)(fresh)
            results.append(_summarize(mattered, alpha, ~keep_TK, matters))
    return results


def _draw(
    tokens: int, num_experts: int, model_top_k: int, mattered: Mattered, generator: torch.Generator
) -> tuple[Candidates, Tensor]:
    """Return each token's slots, and a mask of those that mattered."""
    logits_TE = torch.randn(tokens, num_experts, generator=generator)
    weights_TK, index_TK = logits_TE.softmax(dim=-1).topk(model_top_k)
    truth_TK = (NORM_SPREAD * torch.randn(weights_TK.shape, generator=generator)).exp()
    if mattered == "by contribution":
        truth_TK = truth_TK * weights_TK
    return Candidates(logits_TE, index_TK, weights_TK), truth_TK > truth_TK.median()


def _summarize(
    mattered: Mattered, alpha: float, dropped_TK: Tensor, matters_TK: Tensor
) -> DropNoiseResult:
    num_dropped_T = dropped_TK.sum(dim=-1)
    false_T = (dropped_TK & matters_TK).sum(dim=-1).double() / num_dropped_T.clamp_min(1)
    mean, tokens = float(false_T.mean()), len(false_T)
    margin = 1.96 * float(false_T.std()) / tokens**0.5
    return DropNoiseResult(
        mattered=mattered,
        alpha=alpha,
        tokens=tokens,
        mean_kept=float((~dropped_TK).sum(dim=-1).double().mean()),
        dropped=fraction_with_interval(num_dropped_T > 0),
        false_share=mean,
        false_low=max(0.0, mean - margin),
        false_high=min(1.0, mean + margin),
    )


def measure_drop_noise(tokens: int) -> list[dict[str, Any]]:
    """Run BH-drop on noise."""
    results = drop_noise_control(
        alphas=DROP_ALPHAS, num_experts=NUM_EXPERTS, model_top_k=MODEL_TOP_K, tokens=tokens
    )
    return [
        asdict(result) | {"dropped": dict(zip(DROPPED, result.dropped, strict=True))}
        for result in results
    ]


def measure_text(model_name: str) -> dict[str, Any]:
    """Run every null distribution on held-out text: calibrated on one split, run on the other."""
    model, tokenizer = load_model(model_name, device="cpu", dtype="float32")
    texts = [document.text for document in packaged_documents("calibration")]
    tabled = [name for name, null in NULLS.items() if null.needs_table and not null.by_expert]
    calibration = calibrate(model, tokenizer, texts, nulls=tabled)
    by_expert = [name for name, null in NULLS.items() if null.by_expert]
    larger = calibrate(model, tokenizer, texts, nulls=by_expert, max_tokens=FIT_TOKENS_BY_EXPERT)
    logits_LTE = collect_logits(model, tokenizer)
    rows = []
    for name in NULLS:
        fitted = larger if name in by_expert else calibration
        for alpha in ALPHAS:
            if NULLS[name].needs_table and fitted.resolution(name) > alpha:
                continue
            counted = count_on_text(name, alpha, logits_LTE, fitted)
            rows.append({"null": name, "alpha": alpha, **counted})
    return {
        "model": model_name,
        "model_fingerprint": calibration.model_fingerprint,
        "calibration_tokens": calibration.num_tokens,
        "calibration_tokens_by_expert": larger.num_tokens,
        "tokens": int(logits_LTE.shape[1]),
        "layers": int(logits_LTE.shape[0]),
        "top_k_mass_temperature_1": top_k_mass(logits_LTE, calibration.model_top_k, 1.0),
        "top_k_mass_temperature_2": top_k_mass(logits_LTE, calibration.model_top_k, 2.0),
        "rows": rows,
    }


def collect_logits(model: Any, tokenizer: Any) -> Tensor:
    """Return the logits of the start of every evaluation document, shape (L, T, E)."""
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
    """Return the mean sum of the top-k probabilities at a temperature."""
    probabilities_LTE = (logits_LTE / temperature).softmax(dim=-1)
    return float(probabilities_LTE.topk(k, dim=-1).values.sum(dim=-1).mean())


def count_on_text(
    name: str, alpha: float, logits_LTE: Tensor, calibration: Calibration
) -> dict[str, float]:
    """Return the mean experts over (token, layer) pairs, and the fraction with any rejection."""
    null, used, has_any = NULLS[name], [], []
    for layer, logits_TE in enumerate(logits_LTE):
        table = calibration.table(name, layer) if null.needs_table else None
        rejected_TE = benjamini_hochberg(null.p_from_score(null.score(logits_TE), table), alpha)
        top_k_index_TK = logits_TE.topk(calibration.model_top_k).indices
        used.append(rejected_TE.gather(-1, top_k_index_TK).sum(dim=-1).clamp_min(1))
        has_any.append(rejected_TE.any(dim=-1))
    return {
        "mean_experts": float(torch.cat(used).double().mean()),
        "share_any": float(torch.cat(has_any).double().mean()),
    }


def render(results: dict[str, Any]) -> str:
    """Render the table as Markdown."""
    text = {(row["null"], row["alpha"]): row for row in results["text"].get("rows", [])}
    lines = [
        "| null | its α is | α | experts on noise | (5 seeds) | rejected on noise | tokens with "
        "any rejection on noise, 95 % interval | experts on text | tokens with any on text |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["noise"]:
        on_text = text.get((row["null"], row["alpha"]))
        missing = "out of reach" if text else "not run"
        experts = f"{on_text['mean_experts']:.2f}" if on_text else missing
        share = f"{100 * on_text['share_any']:.1f} %" if on_text else missing
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
            f"tables from {on['calibration_tokens']:,} tokens of the packaged calibration text "
            f"(by expert from {on['calibration_tokens_by_expert']:,}), counted on "
            f"{on['tokens']:,} tokens of the packaged evaluation text. The top-k probabilities "
            f"there sum to {on['top_k_mass_temperature_1']:.2f} on average, at temperature 2 to "
            f"{on['top_k_mass_temperature_2']:.2f}."
        )
    return "\n".join(lines) + "\n"


def render_drop(results: dict[str, Any]) -> str:
    """Render the table of BH-drop on noise as Markdown."""
    lines = [
        "| slots that mattered | α | slots kept of 8 | tokens with any drop, 95 % interval | mean "
        "share of the dropped that mattered, 95 % interval | α / 2 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['mattered']} | {row['alpha']:.2f} | {row['mean_kept']:.2f} "
        f"| {100 * row['dropped']['share']:.1f} % ({100 * row['dropped']['low']:.1f} to "
        f"{100 * row['dropped']['high']:.1f}) | {row['false_share']:.4f} "
        f"({row['false_low']:.4f} to {row['false_high']:.4f}) | {row['alpha'] / 2:.3f} |"
        for row in results["drop_noise"]
    ]
    return "\n".join(lines) + "\n"


def _between(table: str, found: re.Match[str]) -> str:
    return found[1] + table + found[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the JSON, and render it to both Markdown files."""
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
        "drop_noise": measure_drop_noise(options.tokens),
        "text": measure_text(options.model) if options.model else {},
    }
    written = json.dumps(results, indent=1) + "\n"
    (HERE / "noise_table.json").write_text(written, encoding="utf-8")
    tables = {BLOCK: render(json.loads(written)), DROP_BLOCK: render_drop(json.loads(written))}
    (HERE / "noise_table.md").write_text("\n".join(tables.values()), encoding="utf-8")
    page = METHOD.read_text(encoding="utf-8")
    for block, table in tables.items():
        page = block.sub(partial(_between, table), page)
        print(table)
    METHOD.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
