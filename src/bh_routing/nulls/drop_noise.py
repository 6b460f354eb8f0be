"""BH-drop on pure noise: which slots go is arbitrary, and alpha should say how often.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from bh_routing.multitest import benjamini_hochberg
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.noise import FIT_TOKENS, Share, share_with_interval

Mattered = Literal["by chance", "by contribution"]
"""by chance: half of the slots, drawn without looking at their weights. by contribution: those
whose weight times an output norm is above the median, as "needed" defines it, with norms that are
drawn without looking at anything."""

NORM_SPREAD: Final = 0.5
"""Standard deviation of the logarithm of an output norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DropNoiseResult:
    """What BH over a token's slots drops of noise at one alpha."""

    mattered: Mattered
    alpha: float
    tokens: int
    mean_kept: float
    """Mean number of slots a token keeps, at least 1."""
    dropped: Share
    """Share of tokens with any drop."""
    false_share: float
    """Mean over tokens of the share of dropped slots that mattered; 0 where none is dropped."""
    false_low: float
    """95 % interval of it over tokens, normal approximation."""
    false_high: float


def drop_noise_control(
    *,
    alphas: Sequence[float],
    num_experts: int,
    model_top_k: int,
    tokens: int = 10_000,
    seed: int = 0,
) -> list[DropNoiseResult]:
    """Run BH-drop by token where router logits are independent N(0, 1).

    The score is the routing weight: all scales are equal. With slots that mattered by chance, every
    slot scores like those that mattered, so all nulls are true: if the slots of a token were
    independent, or PRDS, the share of tokens with any drop would be at most alpha.

    Args:
        alphas: levels, each in (0, 1).
        num_experts: E.
        model_top_k: slots of a token.
        tokens: tokens of fresh noise.
        seed: of everything drawn.
    Returns:
        One result a way to matter and alpha.
    """
    results = []
    for mattered in get_args(Mattered):
        generator = torch.Generator().manual_seed(seed)
        fit, fit_matters = _draw(FIT_TOKENS, num_experts, model_top_k, mattered, generator)
        fresh, matters = _draw(tokens, num_experts, model_top_k, mattered, generator)
        # The lower tail of the weights is the upper tail of their negatives.
        p_TK = ReferenceTable.from_scores(-fit[fit_matters]).p_values(-fresh)
        for alpha in alphas:
            dropped_TK = benjamini_hochberg(p_TK, alpha)
            dropped_TK.scatter_(-1, fresh.argmax(dim=-1, keepdim=True), False)
            results.append(_summarize(mattered, alpha, dropped_TK, matters))
    return results


def _draw(
    tokens: int, num_experts: int, model_top_k: int, mattered: Mattered, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the weights of each token's slots, and which of them mattered."""
    logits_TE = torch.randn(tokens, num_experts, generator=generator)
    weights_TK = logits_TE.softmax(dim=-1).topk(model_top_k).values
    truth_TK = (NORM_SPREAD * torch.randn(weights_TK.shape, generator=generator)).exp()
    if mattered == "by contribution":
        truth_TK = truth_TK * weights_TK
    return weights_TK, truth_TK > truth_TK.median()


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
        dropped=share_with_interval(num_dropped_T > 0),
        false_share=mean,
        false_low=max(0.0, mean - margin),
        false_high=min(1.0, mean + margin),
    )
