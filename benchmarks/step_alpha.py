"""Measure how many of the experts that BH leaves out of a decode step mattered.

    python -m benchmarks.step_alpha --device cuda
    python -m benchmarks.step_alpha --tokens 4000 --replicates 10    # a quick try
    python -m benchmarks.step_alpha --device cuda --replicates 100 --jobs 6

Each case calibrates on some documents and draws steps from others: held-out documents of the same
text, the evaluation text, another domain, and the evaluation text read by a model whose routers are
random. An expert mattered if its summed squared first-order loss in the step is above the
calibration's median. Two fractions are given: pooled over steps and layers, and the mean over steps
and layers of the fraction in each (0 without a left-out expert), which is what BH bounds by
alpha * pi0 under its assumptions. Intervals: 2.5 and 97.5 % of replicates, each of which draws
clusters of documents with replacement, and then its steps.

Writes `step_alpha.json` and `step_alpha.md`. Axes: S steps, B tokens per step, T tokens, E experts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.wrong_drops import DOMAINS, HERE
from bh_routing.engine.observe import LayerSlots, SlotObserver, join_windows, summarize
from bh_routing.engine.steps import NUM_STEPS, draw_steps, step_pairs, step_tables
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, tokenize_documents
from bh_routing.experiments.wrong_drops import WINDOW
from bh_routing.models import find_routers, load_model
from bh_routing.nulls.contributions import Contributions
from bh_routing.nulls.reservoir import reservoir_capacity
from bh_routing.rules import BenjaminiHochbergDrop, LayerContext
from bh_routing.rules.drop import Scope
from bh_routing.rules.step import StepExperts

ALPHAS: Final = (0.05, 0.1, 0.2, 0.3, 0.4)
SCOPES: Final[tuple[Scope, ...]] = ("step", "step_population")
SIZES: Final = (4, 16, 64)
STEPS: Final = 400
"""Held-out steps per replicate."""


@dataclass(frozen=True)
class Slots:
    """The slots of some documents."""

    layers: list[LayerSlots]
    document_T: Tensor
    clusters: list[str]
    """Cluster of each document, by its number."""


def observe(model: Any, text: Sequence[TokenizedDocument]) -> Slots:
    """Run the model over the text with a backward pass of its loss."""
    observer = SlotObserver(model, find_routers(model), by_loss=True)
    windows, numbers = [], []
    try:
        for number, document in enumerate(text):
            for start in range(0, len(document.ids), WINDOW):
                ids = torch.tensor([document.ids[start : start + WINDOW]], device=model.device)
                if seen := observer.read(ids):
                    windows.append(seen)
                    numbers.append(torch.full((len(seen[0].experts),), number))
    finally:
        observer.close()
    layers = [
        LayerSlots(*(column.to(model.device) for column in slots))
        for slots in join_windows(windows)
    ]
    return Slots(layers, torch.cat(numbers), [document.cluster for document in text])


def fit(slots: Slots, model: Any) -> tuple[Contributions, dict[int, float]]:
    """Return what a calibration on the slots holds, and each step size's cut of the losses."""
    routers = find_routers(model)
    top_k, capacity = routers.model_top_k, reservoir_capacity(routers.num_experts)
    layers = [LayerSlots(*(column.cpu() for column in layer)) for layer in slots.layers]
    found = summarize(layers, routers.num_experts, capacity, seed=0)
    scale_LE = found.scales["sensitivity"]
    steps = step_tables(layers, top_k, scale_LE, slots.document_T, capacity=capacity, seed=0)
    cuts = {}
    for size in SIZES:
        token_SB = draw_steps(slots.document_T, NUM_STEPS, size, seed=size)
        pairs = [
            step_pairs(layer, top_k, scale_E, token_SB)
            for layer, scale_E in zip(layers, scale_LE, strict=True)
        ]
        losses = torch.cat([pair.losses_SE[pair.is_present_SE] for pair in pairs])
        cuts[size] = float(losses.median())
    return replace(found, steps=steps), cuts


Reads = Callable[[StepExperts, Tensor], Tensor]


def bind(contributions: Contributions, model: Any) -> list[dict[tuple[Scope, float], Reads]]:
    """Bind every scope and alpha to every layer: experts and tokens of steps -> what is read."""
    routers = find_routers(model)
    contexts = [
        LayerContext(
            layer=site.layer,
            num_experts=routers.num_experts,
            model_top_k=routers.model_top_k,
            device=model.device,
            contributions=contributions,
        )
        for site in routers.sites
    ]
    return [
        {
            (scope, alpha): BenjaminiHochbergDrop(alpha, scope=scope).step_reads(context)
            for scope in SCOPES
            for alpha in ALPHAS
        }
        for context in contexts
    ]


def resample(slots: Slots, seed: int) -> tuple[Tensor, Tensor]:
    """Draw clusters with replacement; return tokens, and the numbers of their documents anew."""
    names = sorted(set(slots.clusters))
    drawn = np.random.default_rng(seed).integers(len(names), size=len(names)) if seed else None
    chosen = names if drawn is None else [names[number] for number in drawn]
    documents = [d for name in chosen for d, own in enumerate(slots.clusters) if own == name]
    tokens = [(slots.document_T == document).nonzero()[:, 0] for document in documents]
    numbers = [torch.full((len(part),), number) for number, part in enumerate(tokens)]
    return torch.cat(tokens), torch.cat(numbers)


def count(
    slots: Slots,
    fitted: tuple[Contributions, dict[int, float]],
    reads: Sequence[Mapping[tuple[Scope, float], Reads]],
    model: Any,
    size: int,
    seed: int,
) -> dict[tuple[Scope, float], np.ndarray[Any, Any]]:
    """Draw steps and decide them.

    Returns:
        By scope and alpha, summed over steps and layers: left-out pairs that mattered, left-out
        pairs, read pairs, pairs that mattered, pairs, and each step's fraction of wrong ones.
    """
    contributions, cuts = fitted
    routers = find_routers(model)
    token_T, document_T = resample(slots, seed)
    token_SB = token_T[draw_steps(document_T, STEPS, size, seed=1_000 * size + seed)]
    token_SB = token_SB.to(model.device)
    settings = [(scope, alpha) for scope in SCOPES for alpha in ALPHAS]
    # On the device, without a sync.
    counts = torch.zeros(len(settings), 6, dtype=torch.float64, device=model.device)
    for number, layer in enumerate(slots.layers):
        scale_E = contributions.scales["sensitivity"][number].to(model.device)
        pairs = step_pairs(layer, routers.model_top_k, scale_E, token_SB)
        experts = StepExperts(pairs.norms_SE, pairs.is_present_SE)
        mattered_SE = pairs.losses_SE > cuts[size]
        index_TK, weights_TK = (
            column.view(-1, routers.model_top_k)[token_SB.flatten()]
            for column in (layer.experts, layer.weights)
        )
        best_T1 = (weights_TK * scale_E[index_TK]).argmax(dim=-1, keepdim=True)
        best_SB = index_TK.gather(-1, best_T1).view(STEPS, size)
        is_best_SE = torch.zeros_like(mattered_SE).scatter(1, best_SB, torch.ones_like(best_SB) > 0)
        tokens_S = torch.full((STEPS,), size, device=model.device)
        for setting, sums in zip(settings, counts, strict=True):
            is_read_SE = reads[number][setting](experts, tokens_S) | is_best_SE
            dropped_SE = pairs.is_present_SE & ~is_read_SE
            wrong_S, dropped_S = (dropped_SE & mattered_SE).sum(-1), dropped_SE.sum(-1)
            sums += torch.stack(
                [
                    wrong_S.sum().double(),
                    dropped_S.sum().double(),
                    (pairs.is_present_SE & is_read_SE).sum().double(),
                    (pairs.is_present_SE & mattered_SE).sum().double(),
                    pairs.is_present_SE.sum().double(),
                    (wrong_S / dropped_S.clamp_min(1)).double().sum(),
                ]
            )
    return dict(zip(settings, counts.cpu().numpy(), strict=True))


def interval(values_R: np.ndarray[Any, Any]) -> list[float]:
    """Return the value without resampling, and the ends of the interval of the others."""
    return [float(values_R[0]), *map(float, np.quantile(values_R[1:], [0.025, 0.975]))]


def describe(
    case: str,
    slots: Slots,
    fitted: tuple[Contributions, dict[int, float]],
    model: Any,
    replicates: int,
) -> list[dict[str, Any]]:
    """Return a row for each size, scope and alpha of one case."""
    rows, reads = [], bind(fitted[0], model)
    for size in SIZES:
        drawn = [count(slots, fitted, reads, model, size, seed) for seed in range(replicates + 1)]
        for scope, alpha in drawn[0]:
            sums_RC = np.stack([replicate[scope, alpha] for replicate in drawn])
            wrong_R, dropped_R, read_R, mattered_R, pairs_R, by_step_R = sums_RC.T
            units, bound_R = STEPS * len(slots.layers), alpha * mattered_R / pairs_R
            pooled_R, mean_R = wrong_R / np.maximum(dropped_R, 1), by_step_R / units
            rows.append(
                {
                    "case": case,
                    "tokens_per_step": size,
                    "scope": scope,
                    "alpha": alpha,
                    "experts": pairs_R[0] / units,
                    "experts_read": read_R[0] / units,
                    "alpha_pi0": bound_R[0],
                    "pooled": interval(pooled_R),
                    "mean_per_step": interval(mean_R),
                    "pooled_ratio": interval(pooled_R / bound_R),
                    "mean_ratio": interval(mean_R / bound_R),
                }
            )
    return rows


def randomise_routers(model: Any) -> None:
    """Replace the gates' weights by normal noise of the same standard deviation."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    with torch.no_grad():
        for site in find_routers(model).sites:
            weight = site.module.weight
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * float(weight.std()))


HELD_OUT: Final = "held-out documents"
WHOLE: Final = "evaluation text"
TRANSFERS: Final = {
    f"{source} to {target}": (source, target)
    for source, target in zip(DOMAINS, (*DOMAINS[1:], DOMAINS[0]), strict=True)
}
RANDOM: Final = "random routers"
CASES: Final = (HELD_OUT, WHOLE, *TRANSFERS, RANDOM)


def measure_case(case: str, device: Any, tokens: int | None, replicates: int) -> dict[str, Any]:
    """Measure one case."""
    start = time.perf_counter()
    loaded = load_model("demo", device=device, dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    known = tokenize_documents(tokenizer, packaged_documents("calibration"), tokens)
    unseen = tokenize_documents(tokenizer, packaged_documents("evaluation"), tokens)
    own, other = known, unseen
    if case == HELD_OUT:
        own, other = known[::2], known[1::2]
    elif case in TRANSFERS:
        source, target = TRANSFERS[case]
        own = [document for document in known if document.domain == source]
        other = [document for document in unseen if document.domain == target]
    fitted = fit(observe(model, own), model)
    if case == RANDOM:
        randomise_routers(model)
    rows = describe(case, observe(model, other), fitted, model, replicates)
    seconds = time.perf_counter() - start
    print(f"{case}: {seconds:.0f} s", flush=True)
    return {
        "device": str(model.device),
        "torch": torch.__version__,
        "calibration_tokens": sum(len(d.ids) for d in known),
        "tokens": sum(len(d.ids) for d in unseen),
        "steps": STEPS,
        "replicates": replicates,
        "seconds": seconds,
        "rows": rows,
    }


def measure(device: Any, tokens: int | None, replicates: int, jobs: int) -> dict[str, Any]:
    """Measure every case, each in a process of its own."""
    given = [(case, device, tokens, replicates) for case in CASES]
    with get_context("spawn").Pool(jobs) as pool:
        found = pool.starmap(measure_case, given, chunksize=1)
    seconds = sum(one["seconds"] for one in found)
    return {**found[0], "seconds": seconds, "rows": [row for one in found for row in one["rows"]]}


def render(results: dict[str, Any]) -> str:
    """Render the fractions as Markdown."""
    lines = [
        "Fraction of the experts left out of a step that mattered, pooled and as the mean per step "
        "and layer, each with its 95 % interval and its ratio to α·π₀.",
        "",
        "| case | B | scope | α | read | α·π₀ | pooled | ratio | mean per step | ratio |",
        "|:--|--:|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results["rows"]:
        cells = [
            f"{r[name][0]:.{digits}f} ({r[name][1]:.{digits}f} to {r[name][2]:.{digits}f})"
            for name, digits in (
                ("pooled", 3),
                ("pooled_ratio", 2),
                ("mean_per_step", 3),
                ("mean_ratio", 2),
            )
        ]
        lines.append(
            f"| {r['case']} | {r['tokens_per_step']} | `{r['scope']}` | {r['alpha']} | "
            f"{r['experts_read']:.1f} of {r['experts']:.1f} | {r['alpha_pi0']:.3f} | "
            f"{' | '.join(cells)} |"
        )
    footer = (
        f"{results['steps']} steps per replicate, {results['replicates']} replicates; calibrated "
        f"on {results['calibration_tokens']:,} tokens, the half of them for held-out documents; "
        f"{results['tokens']:,} tokens of evaluation text; {results['device']}, torch "
        f"{results['torch']}, {results['seconds']:.0f} s in all processes."
    )
    return "\n".join([*lines, "", footer]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tokens", type=int, help="tokens of either text; default: all")
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="cases measured at a time")
    parser.add_argument("--output", default=str(HERE / "step_alpha"), help="path without suffix")
    options = parser.parse_args(argv)
    results = measure(options.device, options.tokens, options.replicates, options.jobs)
    with open(f"{options.output}.json", "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    with open(f"{options.output}.md", "w", encoding="utf-8") as file:
        file.write(render(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
