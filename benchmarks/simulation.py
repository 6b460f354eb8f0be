"""Measure false discoveries and power in the simulation with planted signals of docs/method.md.

    python benchmarks/simulation.py

Writes the results as JSON next to this file, renders them to Markdown there and in docs/method.md,
between the markers.

Axes: T tokens, E experts, H hidden, K slots.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

import bh_routing
from bh_routing.multitest import benjamini_hochberg, benjamini_yekutieli, storey
from bh_routing.nulls import NULLS
from bh_routing.nulls.base import RouterPass
from bh_routing.rules.noise import fraction_with_interval

HERE = Path(__file__).parent
METHOD = HERE.parent / "docs" / "method.md"
BLOCK = re.compile(r"(<!-- simulation: .*? -->\n).*(<!-- simulation: end -->)", re.DOTALL)


Design = Literal["independent", "low rank"]
"""independent: logits N(0, 1), planted ones shifted. low rank: logits = W h with fewer hidden
coordinates than experts; h is shifted towards the planted experts' gates, which also changes the
other logits."""

NUM_EXPERTS: Final = 64
MODEL_TOP_K: Final = 8
NUM_HIDDEN: Final = 32
SHIFT: Final = 4.0
"""Distance of a planted logit above the background, in standard deviations."""
ALPHAS: Final = (0.05, 0.10)
TRUE_NULL: Final = "true"
"""N(0, 1) with known mean and scale, which the other nulls estimate."""

_PROCEDURES: Final[Mapping[str, Callable[[Tensor, float], Tensor]]] = {
    "bh": benjamini_hochberg, "by": benjamini_yekutieli, "storey": storey,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One null and procedure at one alpha in one design."""

    design: Design
    null: str
    procedure: str
    alpha: float
    tokens: int
    fdr: float
    """Mean over tokens of the fraction of rejected experts not planted; 0 without rejections."""
    fdr_low: float
    """95 % interval of `fdr` over tokens, normal approximation."""
    fdr_high: float
    pooled_share: float
    """Fraction of all tokens' rejected experts that weren't planted; NaN without rejections."""
    power: float
    """Fraction of planted experts that were rejected."""
    mean_rejected: float
    noise_share_any: float
    """Fraction of tokens with any rejection when nothing is planted."""
    noise_low: float
    """Wilson 95 % interval of `noise_share_any`."""
    noise_high: float


class _Sample(NamedTuple):
    seen: RouterPass
    is_planted_TE: Tensor


def run_simulation(
    tokens: int = 10_000, seed: int = 0, nulls: Sequence[str] = (TRUE_NULL, *NULLS)
) -> list[Row]:
    """Measure every null under every procedure, with and without planted signals.

    Each token has 0 to 7 planted experts. A null that needs a table gets it from other tokens of
    the same design, signals included, as in calibration text.

    Args:
        tokens: new tokens per cell.
        seed: seed of all draws, which don't depend on `nulls`.
        nulls: `TRUE_NULL` or names from the catalog.
    Returns:
        Rows by design, null, procedure and alpha.
    """
    rows = []
    designs: tuple[Design, ...] = ("independent", "low rank")
    for number, design in enumerate(designs):
        generator = torch.Generator().manual_seed(seed * len(designs) + number)
        gate_EH = torch.randn(NUM_EXPERTS, NUM_HIDDEN, generator=generator)
        gate_EH = gate_EH / gate_EH.norm(dim=-1, keepdim=True)
        fitting, planted = (_draw(design, tokens, gate_EH, generator) for _ in range(2))
        unplanted = _draw(design, tokens, gate_EH, generator, most_planted=0)
        for null in nulls:
            p_TE, noise_p_TE = (_p_values(null, fitting, s) for s in (planted, unplanted))
            for procedure, reject in _PROCEDURES.items():
                for alpha in ALPHAS:
                    rejected_TE = reject(p_TE, alpha)
                    share, low, high = fraction_with_interval(reject(noise_p_TE, alpha).any(dim=-1))
                    rows.append(
                        Row(
                            design=design,
                            null=null,
                            procedure=procedure,
                            alpha=alpha,
                            tokens=tokens,
                            **_rates(rejected_TE, planted.is_planted_TE),
                            noise_share_any=share,
                            noise_low=low,
                            noise_high=high,
                        )
                    )
    return rows


def _draw(
    design: Design,
    tokens: int,
    gate_EH: Tensor,
    generator: torch.Generator,
    most_planted: int = MODEL_TOP_K - 1,
) -> _Sample:
    num_planted_T1 = torch.randint(most_planted + 1, (tokens, 1), generator=generator)
    order_TE = torch.rand(tokens, NUM_EXPERTS, generator=generator).argsort(dim=-1).argsort(dim=-1)
    is_planted_TE = order_TE < num_planted_T1
    hidden_TH = torch.randn(tokens, NUM_HIDDEN, generator=generator)
    if design == "low rank":
        hidden_TH = hidden_TH + SHIFT * (is_planted_TE.float() @ gate_EH)
        logits_TE = hidden_TH @ gate_EH.T
    else:
        logits_TE = torch.randn(tokens, NUM_EXPERTS, generator=generator) + SHIFT * is_planted_TE
    seen = RouterPass(logits_TE, logits_TE.topk(MODEL_TOP_K).indices, hidden_TH, gate_EH)
    return _Sample(seen, is_planted_TE)


def _p_values(name: str, fitting: _Sample, sample: _Sample) -> Tensor:
    logits_TE = sample.seen.router_logits_TE
    if name == TRUE_NULL:
        return NULLS["gaussian"].p_from_score(logits_TE)
    null = NULLS[name]
    table, seen = None, fitting.seen
    if name == "permutation":
        # It permutes gates, whose product with the input it requires the logits to be.
        assert seen.hidden_states_TH is not None and seen.gate_EH is not None
        seen = seen._replace(router_logits_TE=seen.hidden_states_TH @ seen.gate_EH.T)
    if null.needs_table:
        table = null.table_of(seen)
    return null.p_from_score(null.score(logits_TE), table)


def _rates(rejected_TE: Tensor, is_planted_TE: Tensor) -> dict[str, float]:
    num_rejected_T = rejected_TE.sum(dim=-1)
    num_false_T = (rejected_TE & ~is_planted_TE).sum(dim=-1)
    fraction_T = num_false_T.double() / num_rejected_T.clamp_min(1)
    fdr = float(fraction_T.mean())
    margin = 1.96 * float(fraction_T.std()) / len(fraction_T) ** 0.5
    num_rejected = int(num_rejected_T.sum())
    return {
        "fdr": fdr,
        "fdr_low": max(0.0, fdr - margin),
        "fdr_high": min(1.0, fdr + margin),
        "pooled_share": int(num_false_T.sum()) / num_rejected if num_rejected else float("nan"),
        "power": int((rejected_TE & is_planted_TE).sum()) / int(is_planted_TE.sum()),
        "mean_rejected": num_rejected / len(fraction_T),
    }


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
