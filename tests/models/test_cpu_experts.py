"""A model on a CPU computes with sparse experts as with transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bh_routing.kernels.experts import MOST_GATHERED, NAME, sparse_experts_forward
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


def test_a_model_on_a_cpu_uses_them(demo: LoadedModel) -> None:
    assert demo.model.config._experts_implementation == NAME
