"""Noise control: the number of experts that a rule keeps of pure noise.

Axes: T tokens, E experts, K candidate slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bh_routing.multitest import count_rejected
from bh_routing.nulls.catalog import get_null
from bh_routing.nulls.noise import fit_on_noise, fraction_with_interval
from bh_routing.rules.base import Candidates, LayerContext
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg


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
    share = fraction_with_interval(num_rejected_T > 0)
    return NoiseResult(
        alpha=rule.alpha,
        mean_experts=float(keep_TK.sum(dim=-1).double().mean()),
        share_any=share.share,
        share_any_low=share.low,
        share_any_high=share.high,
        tokens=len(logits_TE),
        mean_rejected=float(num_rejected_T.double().mean()),
    )
