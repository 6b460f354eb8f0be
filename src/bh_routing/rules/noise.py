"""Noise control: the number of experts that a rule keeps of pure noise.

Axes: T tokens, E experts, K candidate slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bh_routing.multitest import count_rejected
from bh_routing.nulls.base import Null, ReferenceTable, RouterPass
from bh_routing.nulls.catalog import get_null
from bh_routing.rules.base import LayerContext
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.plan import Candidates

FIT_TOKENS: Final = 16_384
"""Noise tokens per table: as many as a calibration reads by default."""

FIT_TOKENS_BY_EXPERT: Final = 4 * FIT_TOKENS
"""The same with one table per expert, to which a token contributes one score instead of E."""

NOISE_HIDDEN: Final = 512
"""Width of the random hidden states, for a null whose reference is computed from a gate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseResult:
    """Statistics of one rule's selections on noise."""

    alpha: float
    mean_experts: float
    """Mean number of experts per token that the rule keeps."""
    share_any: float
    """Fraction of tokens with any rejection by the rule's procedure."""
    share_any_low: float
    """Wilson 95 % interval of share_any, lower end."""
    share_any_high: float
    """Upper end."""
    tokens: int
    mean_rejected: float
    """Mean number of experts rejected per token, before the rule's limits."""


def noise_control(
    rules: Sequence[BenjaminiHochberg],
    *,
    num_experts: int,
    model_top_k: int,
    tokens: int = 10_000,
    seed: int = 0,
) -> list[NoiseResult]:
    """Run rules on router logits that are independent N(0, 1), without any signal.

    A null that needs a table gets one from other noise, with the top-k of that noise as the
    model's selection. Every rejection is false, so the fraction of tokens with any rejection is
    the false discovery rate: alpha is an error rate only if that fraction is at most alpha.

    Args:
        rules: rules to run, with their own procedures and limits.
        num_experts: E.
        model_top_k: the model's own experts per token; the others are background.
        tokens: number of tokens of new noise.
        seed: seed of both kinds of noise; rules with the same null get the same noise.
    Returns:
        One result per rule, in the same order.
    Raises:
        InputError: a rule's limits don't fit `num_experts` or `model_top_k`.
    """
    contexts: dict[str, LayerContext] = {}
    logits: dict[str, Tensor] = {}
    for name in {rule.null for rule in rules}:
        generator = torch.Generator().manual_seed(seed)
        contexts[name] = LayerContext(
            layer=0,
            num_experts=num_experts,
            model_top_k=model_top_k,
            device=torch.device("cpu"),
            table=fit_on_noise(get_null(name), num_experts, model_top_k, generator),
        )
        logits[name] = torch.randn(tokens, num_experts, generator=generator)
    return [_run_on_noise(rule, contexts[rule.null], logits[rule.null]) for rule in rules]


def _run_on_noise(rule: BenjaminiHochberg, context: LayerContext, logits_TE: Tensor) -> NoiseResult:
    select, null = rule.bind(context), get_null(rule.null)
    top = logits_TE.topk(rule.num_candidates(context.model_top_k))
    weights_TK = logits_TE.softmax(dim=-1).gather(-1, top.indices)
    keep_TK = select(Candidates(logits_TE, top.indices, weights_TK))
    p_TE = null.p_from_score(null.score(logits_TE, rule.temperature), context.table)
    num_rejected_T = count_rejected(p_TE, rule.alpha, rule.procedure)
    share, low, high = fraction_with_interval(num_rejected_T > 0)
    return NoiseResult(
        alpha=rule.alpha,
        mean_experts=float(keep_TK.sum(dim=-1).double().mean()),
        share_any=share,
        share_any_low=low,
        share_any_high=high,
        tokens=len(logits_TE),
        mean_rejected=float(num_rejected_T.double().mean()),
    )


def fit_on_noise(
    null: Null, num_experts: int, model_top_k: int, generator: torch.Generator
) -> ReferenceTable | None:
    """Return the null's table from independent N(0, 1) logits; None if it needs none.

    The top-k of that noise replaces the model's selection.
    """
    if not null.needs_table:
        return None
    if null.needs_gate:
        seen = _noise_with_gate(num_experts, model_top_k, generator)
    else:
        tokens = FIT_TOKENS_BY_EXPERT if null.by_expert else FIT_TOKENS
        logits_TE = torch.randn(tokens, num_experts, generator=generator)
        seen = RouterPass(logits_TE, logits_TE.topk(model_top_k, dim=-1).indices)
    return null.table_of(seen)


def _noise_with_gate(num_experts: int, model_top_k: int, generator: torch.Generator) -> RouterPass:
    """Draw random hidden states and a random gate, scaled so that logits have variance 1."""
    hidden_TH = torch.randn(FIT_TOKENS, NOISE_HIDDEN, generator=generator)
    gate_EH = torch.randn(num_experts, NOISE_HIDDEN, generator=generator) / NOISE_HIDDEN**0.5
    logits_TE = hidden_TH @ gate_EH.T
    top_k_index_TK = logits_TE.topk(model_top_k, dim=-1).indices
    return RouterPass(logits_TE, top_k_index_TK, hidden_TH, gate_EH)


def fraction_with_interval(is_true_T: Tensor) -> tuple[float, float, float]:
    """Return the fraction of True values, and both ends of its Wilson 95 % interval."""
    # Imported here: scipy.stats takes longer to import than everything else in this package.
    from scipy.stats import binomtest

    num_true = int(is_true_T.sum())
    ends = binomtest(num_true, len(is_true_T)).proportion_ci(0.95, method="wilson")
    return num_true / len(is_true_T), float(ends.low), float(ends.high)
