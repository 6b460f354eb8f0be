"""Decode steps drawn from observed slots: the reference distribution of rules on steps.

Axes: S steps, B tokens per step, T tokens, E experts, K slots, N reference scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.engine.observe import LayerSlots
from bh_routing.nulls.contributions import ALL_STEPS, NEEDED_STEPS, STEP_SIZES
from bh_routing.rules.step import step_experts

NUM_STEPS: Final = 1_500
"""Drawn steps of each size."""


class StepPairs(NamedTuple):
    """The pairs of expert and step of one layer, each field of shape (S, E)."""

    norms_SE: Tensor
    """Roots of the Fisher masses, float32: the statistic."""
    losses_SE: Tensor
    """Roots of the summed squared first-order losses, float32: the truth."""
    is_present_SE: Tensor
    """Bool: whether a token of the step has the expert in its top-k."""


def draw_steps(document_T: Tensor, num_steps: int, tokens: int, seed: int) -> Tensor:
    """Draw steps whose tokens come from different documents, each document as likely as any other.

    With fewer documents than tokens per step, each document gives as many tokens as any other, or
    one more.

    Args:
        document_T: number of each token's document, ascending.
        num_steps: S.
        tokens: B.
        seed: seed of the draw.
    Returns:
        int64 (S, B), numbers of tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    counts_D: Tensor = document_T.unique_consecutive(return_counts=True)[1]
    starts_D, num_documents = counts_D.cumsum(0) - counts_D, len(counts_D)
    rounds = ceil(tokens / num_documents)
    keys_SRD = torch.rand(num_steps, rounds, num_documents, generator=generator)
    chosen_SB = keys_SRD.argsort(dim=-1).flatten(1)[:, :tokens]
    place_SB = torch.rand(num_steps, tokens, generator=generator, dtype=torch.float64)
    return starts_D[chosen_SB] + (place_SB * counts_D[chosen_SB]).long()


def step_pairs(slots: LayerSlots, top_k: int, scale_E: Tensor, token_SB: Tensor) -> StepPairs:
    """Return mass and loss of every expert in every step of one layer.

    Args:
        slots: the layer's joined slots, with losses.
        top_k: slots per token.
        scale_E: the layer's sensitivities.
        token_SB: from `draw_steps`.
    """
    num_steps, tokens = token_SB.shape
    index_TK, weights_TK, losses_TK = (
        column.view(-1, top_k)[token_SB.flatten()]
        for column in (slots.experts, slots.weights, slots.losses)
    )
    step_T1 = torch.arange(num_steps, device=index_TK.device).repeat_interleave(tokens)[:, None]
    norms, losses = (
        step_experts(scores_TK, index_TK, step_T1, num_experts=len(scale_E), num_steps=num_steps)
        for scores_TK in (weights_TK * scale_E[index_TK], losses_TK)
    )
    return StepPairs(norms.norms_SE, losses.norms_SE, norms.is_present_SE)


def step_tables(
    layers: Sequence[LayerSlots],
    top_k: int,
    scale_LE: Tensor,
    document_T: Tensor,
    *,
    capacity: int,
    seed: int,
) -> dict[str, Tensor]:
    """Compute the tables of needed and of all pairs, pooled over layers, for each size of step.

    A pair is needed if its summed squared loss is above the median of all pairs of its size.

    Args:
        layers: joined slots of each layer, with losses.
        top_k: slots per token.
        scale_LE: sensitivities.
        document_T: number of each token's document, ascending.
        capacity: maximum number of scores in a row.
        seed: seed of the draws.
    Returns:
        Tensors by name, as in `Contributions.steps`; all rows are of the length of the shortest.
    """
    rows: dict[str, list[Tensor]] = {NEEDED_STEPS: [], ALL_STEPS: []}
    for tokens in STEP_SIZES:
        token_SB = draw_steps(document_T, NUM_STEPS, tokens, seed + tokens)
        pairs = [
            step_pairs(slots, top_k, scale_E, token_SB)
            for slots, scale_E in zip(layers, scale_LE, strict=True)
        ]
        norms_N = torch.cat([pair.norms_SE[pair.is_present_SE] for pair in pairs])
        losses_N = torch.cat([pair.losses_SE[pair.is_present_SE] for pair in pairs])
        rows[ALL_STEPS].append(norms_N)
        rows[NEEDED_STEPS].append(norms_N[losses_N > losses_N.median()])
    return {name: _sampled(scores, capacity, seed) for name, scores in rows.items()}


def _sampled(rows: Sequence[Tensor], capacity: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    length = min(capacity, *(len(row) for row in rows))
    sampled = [row[torch.randperm(len(row), generator=generator)[:length]] for row in rows]
    return torch.stack(sampled).sort(dim=-1).values
