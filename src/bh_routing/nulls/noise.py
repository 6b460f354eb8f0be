"""The control every null must face: how much it selects where there is nothing to select.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.multitest import benjamini_hochberg
from bh_routing.nulls.base import Null, ReferenceTable, RouterPass
from bh_routing.nulls.catalog import get_null

FIT_TOKENS: Final = 16_384
"""Noise tokens behind a table: as many as a calibration reads by default."""

FIT_TOKENS_BY_EXPERT: Final = 4 * FIT_TOKENS
"""The same for one table an expert, to which a token gives one score and not E."""

NOISE_HIDDEN: Final = 512
"""Width of the random hidden states, for a null whose reference is made from a gate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseResult:
    """What BH selects on noise at one alpha."""

    alpha: float
    mean_experts: float
    """Mean number of experts a token uses: those of its top-k that are rejected, at least 1."""
    share_any: float
    """Share of tokens with any rejection."""
    share_any_low: float
    """Wilson 95 % interval of share_any, lower end."""
    share_any_high: float
    """Upper end."""
    tokens: int
    mean_rejected: float
    """Mean number of experts rejected a token, before those two limits."""


def noise_control(
    null_name: str,
    *,
    alphas: Sequence[float],
    num_experts: int,
    model_top_k: int,
    tokens: int = 10_000,
    seed: int = 0,
) -> list[NoiseResult]:
    """Run BH on router logits that are independent N(0, 1): nothing stands out by construction.

    A null that needs a table gets one from other noise, with the top-k of that noise in place of
    the model's selection. Each rejection is false, so the share of tokens with any rejection is
    the false discovery rate there: alpha is an error rate only if that share is at most alpha.

    Args:
        null_name: name of the null.
        alphas: levels, each in (0, 1).
        num_experts: E.
        model_top_k: the model's own experts a token, which decides what is background.
        tokens: tokens of fresh noise.
        seed: of both noises.
    Returns:
        One result an alpha, in the order of `alphas`.
    Raises:
        InputError: unknown null, or an alpha outside (0, 1).
    """
    null = get_null(null_name)
    generator = torch.Generator().manual_seed(seed)
    table = _fit_on_noise(null, num_experts, model_top_k, generator)
    logits_TE = torch.randn(tokens, num_experts, generator=generator)
    top_k_index_TK = logits_TE.topk(model_top_k).indices
    p_TE = null.p_from_score(null.score(logits_TE), table)
    return [_summarize(alpha, benjamini_hochberg(p_TE, alpha), top_k_index_TK) for alpha in alphas]


def _fit_on_noise(
    null: Null, num_experts: int, model_top_k: int, generator: torch.Generator
) -> ReferenceTable | None:
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
    """Random hidden states and a random gate, scaled so that logits have variance 1."""
    hidden_TH = torch.randn(FIT_TOKENS, NOISE_HIDDEN, generator=generator)
    gate_EH = torch.randn(num_experts, NOISE_HIDDEN, generator=generator) / NOISE_HIDDEN**0.5
    logits_TE = hidden_TH @ gate_EH.T
    top_k_index_TK = logits_TE.topk(model_top_k, dim=-1).indices
    return RouterPass(logits_TE, top_k_index_TK, hidden_TH, gate_EH)


def _summarize(alpha: float, rejected_TE: Tensor, top_k_index_TK: Tensor) -> NoiseResult:
    used_T = rejected_TE.gather(-1, top_k_index_TK).sum(dim=-1).clamp_min(1)
    share = share_with_interval(rejected_TE.any(dim=-1))
    return NoiseResult(
        alpha=alpha,
        mean_experts=float(used_T.double().mean()),
        share_any=share.share,
        share_any_low=share.low,
        share_any_high=share.high,
        tokens=len(rejected_TE),
        mean_rejected=float(rejected_TE.sum(dim=-1).double().mean()),
    )


class Share(NamedTuple):
    """A share of tokens and its Wilson 95 % interval."""

    share: float
    low: float
    high: float


def share_with_interval(is_true_T: Tensor) -> Share:
    """Return the share of True."""
    # Loaded here: scipy.stats takes longer to import than everything else in this package.
    from scipy.stats import binomtest

    num_true = int(is_true_T.sum())
    interval = binomtest(num_true, len(is_true_T)).proportion_ci(0.95, method="wilson")
    return Share(num_true / len(is_true_T), float(interval.low), float(interval.high))
