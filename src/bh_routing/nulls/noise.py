"""Reference tables from pure noise: router logits without any expert to select.

Axes: T tokens, E experts, K slots, H hidden.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.nulls.base import Null, ReferenceTable, RouterPass

FIT_TOKENS: Final = 16_384
"""Noise tokens per table: as many as a calibration reads by default."""

FIT_TOKENS_BY_EXPERT: Final = 4 * FIT_TOKENS
"""The same with one table per expert, to which a token contributes one score instead of E."""

NOISE_HIDDEN: Final = 512
"""Width of the random hidden states, for a null whose reference is computed from a gate."""


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


class Share(NamedTuple):
    """A fraction of tokens and its Wilson 95 % interval."""

    share: float
    low: float
    high: float


def fraction_with_interval(is_true_T: Tensor) -> Share:
    """Return the fraction of True values with its interval."""
    # Imported here: scipy.stats takes longer to import than everything else in this package.
    from scipy.stats import binomtest

    num_true = int(is_true_T.sum())
    interval = binomtest(num_true, len(is_true_T)).proportion_ci(0.95, method="wilson")
    return Share(num_true / len(is_true_T), float(interval.low), float(interval.high))
