"""Measure how often a dropped slot mattered, for the alphas of docs/method.md on held-out text.

    python -m benchmarks.wrong_drops --device cuda    # measure
    python -m benchmarks.wrong_drops --render         # only render the stored results

One pass of the unmodified model over the evaluation text, with the packaged calibration. Each rule
decides on the router's proposals and is judged by the true contribution of each slot: a slot
mattered if that is above the threshold from the calibration text, by the rule's own definition.
BH-select tests another hypothesis: there, "wrong" is a selected slot that didn't matter by norm,
which shows that its alpha isn't a bound on that.

Writes `wrong_drops.json`, and renders it to `wrong_drops.md` and docs/method.md, between the
markers. Axes: S positions, T tokens, K slots, G blocks, R rules, D documents, F fields of Counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

import bh_routing
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.observe import LayerSlots, SlotObserver
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, tokenize_documents
from bh_routing.errors import CalibrationError
from bh_routing.models import find_routers, load_model
from bh_routing.models.load import DeviceName
from bh_routing.models.routing import BoundRule, bind_rule
from bh_routing.nulls import Calibration
from bh_routing.rules import BenjaminiHochberg, BenjaminiHochbergDrop, Candidates, Rule
from bh_routing.stats.clustered import estimate_ratio

# The usual levels, then beyond those that leave 5 and 4 of 8 experts (about 0.16 and 0.28). Half of
# all slots matter by definition, so a bound of 0.5 or more is void.
ALPHAS = (0.01, 0.02, 0.05, 0.10, 0.20, 0.40)
DOMAINS = ("textbook", "fiction", "documentation")
CALIBRATION_TOKENS = 16_384
WINDOW = 1024
HERE = Path(__file__).parent
METHOD = HERE.parent / "docs" / "method.md"
Read = Callable[[Tensor], list[tuple[Candidates, LayerSlots]]]


class Judged(NamedTuple):
    """A rule, and the calibration for its decisions and their judgement."""

    name: str
    rule: Rule
    calibration: Calibration


class Counts(NamedTuple):
    """Sums over tokens and layers, as scalars or arrays."""

    units: Any
    """Token-layer pairs."""
    kept: Any
    chosen: Any
    """Slots whose hypothesis the rule rejected: dropped slots, or BH-select's selected slots."""
    wrong: Any
    mattered: Any
    token_shares: Any
    """Sum over units of wrong / chosen, 0 if none is chosen."""
    blocks: Any
    """Families of tests: tokens, or the blocks of scope "block"."""
    block_shares: Any
    """Sum over blocks of wrong / chosen, 0 if none is chosen."""


def count(rule: Rule, keep_TK: Tensor, mattered_TK: Tensor) -> Tensor:
    """Count the decisions in one layer of one window: the fields of Counts, float64, shape (F,)."""
    if isinstance(rule, BenjaminiHochbergDrop):
        chosen_TK, wrong_TK = ~keep_TK, ~keep_TK & mattered_TK
    else:
        chosen_TK, wrong_TK = keep_TK, keep_TK & ~mattered_TK
    by_block = isinstance(rule, BenjaminiHochbergDrop) and rule.scope == "block"
    size = rule.block_tokens if isinstance(rule, BenjaminiHochbergDrop) and by_block else 1
    chosen_T, wrong_T = chosen_TK.sum(-1).double(), wrong_TK.sum(-1).double()
    chosen_G, wrong_G = (
        torch.stack([block.sum() for block in column_T.split(size)]) if by_block else column_T
        for column_T in (chosen_T, wrong_T)
    )
    counts = Counts(
        units=torch.tensor(len(chosen_T)),
        kept=keep_TK.sum(),
        chosen=chosen_T.sum(),
        wrong=wrong_T.sum(),
        mattered=mattered_TK.sum(),
        token_shares=(wrong_T / chosen_T.clamp_min(1)).sum(),
        blocks=torch.tensor(len(chosen_G)),
        block_shares=(wrong_G / chosen_G.clamp_min(1)).sum(),
    )
    return torch.stack([value.to(keep_TK.device, torch.float64) for value in counts])


@contextmanager
def reader(model: Any) -> Iterator[Read]:
    """Yield a function from a window (1, S) to each layer's proposals and true slots."""
    routers = find_routers(model)
    device = model.device
    logits: list[Tensor] = []
    with ExitStack() as undo:
        for site in routers.sites:
            hook = site.module.register_forward_hook(lambda _, __, o: logits.append(o[0].detach()))
            undo.callback(hook.remove)
        observer = SlotObserver(model, routers, by_loss=True)
        undo.callback(observer.close)

        def read(ids_1S: Tensor) -> list[tuple[Candidates, LayerSlots]]:
            logits.clear()
            seen = []
            for logits_TE, host in zip(logits, observer.read(ids_1S.to(device)), strict=False):
                slots = LayerSlots(*(column.to(device) for column in host))
                proposed = Candidates(logits_TE.float(), slots.experts, slots.weights)
                seen.append((proposed, slots))
            return seen

        yield read


def judge(
    model: Any, text: Sequence[TokenizedDocument], judged: Sequence[Judged]
) -> NDArray[np.float64]:
    """Count every rule's decisions on every document, shape (D, R, F)."""
    bound = [bind_rule(model, rule, calibration) for _, rule, calibration in judged]
    counts_D = []
    with reader(model) as read:
        for document in text:
            counts_RF = torch.zeros(len(judged), len(Counts._fields), dtype=torch.float64)
            for start in range(0, len(document.ids), WINDOW):
                seen = read(torch.tensor([document.ids[start : start + WINDOW]]))
                for layer, (candidates, slots) in enumerate(seen):
                    counts_RF += _count_all(judged, bound, layer, candidates, slots)
            counts_D.append(counts_RF)
    return torch.stack(counts_D).numpy()


@torch.no_grad()
def _count_all(
    judged: Sequence[Judged],
    bound: Sequence[BoundRule],
    layer: int,
    candidates: Candidates,
    slots: LayerSlots,
) -> Tensor:
    rows = []
    for (_, rule, calibration), ready in zip(judged, bound, strict=True):
        assert calibration.contributions is not None  # made with "needed_by_loss"
        definition = rule.needed if isinstance(rule, BenjaminiHochbergDrop) else "norm"
        mattered_TK = slots.truth(definition) > calibration.contributions.cuts[definition]
        rows.append(count(rule, ready.selectors[layer](candidates), mattered_TK))
    return torch.stack(rows).cpu()


def share(values: Any, weights: Any, clusters: Sequence[str]) -> dict[str, float | None]:
    """Return a ratio over documents with its 95 % interval over clusters, clipped to [0, 1]."""
    if not np.any(weights):
        return {"estimate": None, "low": None, "high": None}
    ratio = estimate_ratio(values, weights, clusters)
    ends = (float(np.clip(end[0], 0, 1)) for end in ratio.interval(0.95))
    low, high = (end if np.isfinite(end) else None for end in ends)
    return {"estimate": float(ratio.estimate_R[0]), "low": low, "high": high}


def describe(
    item: Judged, counts_DF: NDArray[np.float64], text: Sequence[TokenizedDocument], domain: str
) -> dict[str, Any]:
    """Return one row: a rule on the documents of one domain, or of all."""
    chosen = [i for i, d in enumerate(text) if domain in ("all", d.domain)]
    clusters = [text[i].cluster for i in chosen]
    counts = Counts(*counts_DF[chosen].T)
    drops = isinstance(item.rule, BenjaminiHochbergDrop)
    share_mattered = counts.mattered.sum() / (counts.units.sum() * item.calibration.model_top_k)
    return {
        "variant": item.name,
        "wrong": "dropped though it mattered" if drops else "selected though it didn't matter",
        "alpha": getattr(item.rule, "alpha", None),
        "domain": domain,
        "clusters": len(set(clusters)),
        "mean_experts": counts.kept.sum() / counts.units.sum(),
        "share_mattered": share_mattered,
        "per_token": share(counts.token_shares, counts.units, clusters),
        "per_block": share(counts.block_shares, counts.blocks, clusters),
        "pooled": share(counts.wrong, counts.chosen, clusters),
    }


def variants(calibration: Calibration, model: Any) -> list[Judged]:
    """Return all rules with an alpha, at every alpha that the calibration can resolve."""
    named: dict[str, Callable[[float], Rule]] = {}
    for statistic in ("sensitivity", "contribution"):
        for needed in ("norm", "loss"):
            for scope in ("token", "block", "population"):
                named[f"bh_drop {scope}, {statistic}, {needed}"] = partial(
                    BenjaminiHochbergDrop,
                    scope=scope,
                    statistic=statistic,
                    needed=needed,
                )
    selects = {"background": ("bh", "by", "storey"), "gaussian": ("bh",)}
    for null, procedures in selects.items():
        for procedure in procedures:
            named[f"bh {null}, {procedure}"] = partial(
                BenjaminiHochberg,
                null=null,
                procedure=procedure,  # type: ignore[arg-type]
            )
    found = []
    for name, make in named.items():
        for alpha in ALPHAS:
            try:
                bind_rule(model, make(alpha), calibration)
            except CalibrationError as error:
                print(f"left out: {name} at {alpha:g}: {error}", flush=True)
                continue
            found.append(Judged(name, make(alpha), calibration))
    return found


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


def publish(name: str, table: str, excerpt: str) -> None:
    """Write a table next to its JSON, and an excerpt between its markers in docs/method.md."""
    (HERE / f"{name}.md").write_text(table, encoding="utf-8")
    page = METHOD.read_text(encoding="utf-8")
    block = re.compile(rf"(<!-- {name}: .*? -->\n).*(<!-- {name}: end -->)", re.DOTALL)
    METHOD.write_text(block.sub(lambda m: m[1] + excerpt + m[2], page), encoding="utf-8")


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
    judged = variants(calibration, model)
    counts_DRF = judge(model, text, judged)
    print(f"judged {len(judged)} rules after {time.perf_counter() - start:.0f} s", flush=True)
    rows = [
        describe(item, counts_DRF[:, number], text, domain)
        for number, item in enumerate(judged)
        for domain in ("all", *DOMAINS)
    ]
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
