"""The negative control: what exactly it does, so that nobody takes it for a test."""

from __future__ import annotations

import pytest
import torch

from bh_routing.multitest import count_rejected
from bh_routing.nulls import get_null

NULL = get_null("softmax")
ALPHAS = (0.01, 0.05, 0.10, 0.5, 0.9)


def counts(logits_TE: torch.Tensor, alpha: float) -> torch.Tensor:
    return count_rejected(NULL.p_from_score(NULL.score(logits_TE)), alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_at_most_one_expert_is_rejected_below_1_minus_1_over_e(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 5.0, 50.0):
        logits_TE = torch.randn(2_000, 64, generator=generator) * scale
        assert int(counts(logits_TE, alpha).max()) <= 1


def test_usually_nothing_is_rejected() -> None:
    logits_TE = torch.randn(2_000, 64, generator=torch.Generator().manual_seed(1))
    assert int(counts(logits_TE, 0.10).sum()) == 0


@pytest.mark.parametrize("alpha", [0.05, 0.10])
def test_one_expert_is_rejected_where_its_probability_reaches_1_minus_alpha_over_e(
    alpha: float,
) -> None:
    others = 7
    for probability, expected in ((1 - alpha / 8 + 1e-4, 1), (1 - alpha / 8 - 1e-4, 0)):
        top = torch.tensor(probability / (1 - probability) * others).log()
        logits = torch.cat([top[None], torch.zeros(others)])
        assert int(counts(logits, alpha)) == expected


def test_beyond_1_minus_1_over_e_a_flat_token_rejects_everything() -> None:
    assert int(counts(torch.zeros(4), 0.76)) == 4
    assert int(counts(torch.zeros(4), 0.74)) == 0


def test_the_temperature_divides_the_logits() -> None:
    logits_TE = torch.tensor([[2.0, 0.0]])
    assert torch.allclose(NULL.score(logits_TE, 2.0), (logits_TE / 2).softmax(-1))
