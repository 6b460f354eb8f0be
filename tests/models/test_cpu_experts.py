"""A model on a CPU computes with sparse experts as with transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bh_routing.kernels.experts import MOST_GATHERED, NAME, TOKENS_AT_A_TIME, sparse_experts_forward
from bh_routing.models import LoadedModel


@pytest.mark.parametrize("tokens", [1, 3, MOST_GATHERED // 8, MOST_GATHERED])
@pytest.mark.parametrize("dropped", [0, 5])
def test_they_mix_what_grouping_mixes(demo: LoadedModel, tokens: int, dropped: int) -> None:
    experts = demo.model.model.layers[2].mlp.experts
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 128, generator=generator)
    weights, index = torch.rand(tokens, 64, generator=generator).topk(8, dim=-1)
    weights[:, 8 - dropped :] = 0.0
    grouped: Any = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    torch.testing.assert_close(
        sparse_experts_forward(experts, hidden, index, weights),
        grouped(experts, hidden, index, weights),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(("tokens", "slots"), [(300, 16), (2 * TOKENS_AT_A_TIME + 1, 8)])
def test_many_tokens_are_mixed_as_by_grouping_all_slots(
    demo: LoadedModel, tokens: int, slots: int
) -> None:
    experts = demo.model.model.layers[2].mlp.experts
    generator = torch.Generator().manual_seed(slots)
    hidden = torch.randn(tokens, 128, generator=generator)
    weights, index = torch.rand(tokens, 64, generator=generator).topk(slots, dim=-1)
    weights[torch.rand(tokens, slots, generator=generator) < 0.5] = 0.0
    grouped: Any = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    expected = grouped(experts, hidden, index, weights)
    mixed = sparse_experts_forward(experts, hidden, index, weights)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)


def test_tokens_without_a_kept_slot_are_mixed_to_zero(demo: LoadedModel) -> None:
    experts = demo.model.model.layers[2].mlp.experts
    hidden, index = torch.ones(100, 128), torch.zeros(100, 8, dtype=torch.long)
    mixed = sparse_experts_forward(experts, hidden, index, torch.zeros(100, 8))
    assert torch.equal(mixed, torch.zeros(100, 128))


def test_a_model_on_a_cpu_uses_them(demo: LoadedModel) -> None:
    assert demo.model.config._experts_implementation == NAME
