"""The reference router proposes as transformers' do. Axes: T tokens, E experts, K slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from bh_routing.rules import BenjaminiHochberg, ContributionThreshold, FisherMass, TopK
from bh_routing.rules.router import SoftmaxFamily, reference_router
from tests.rules.proposals import context_for, random_logits

NUM_EXPERTS = 16
SIZES = {"hidden_size": NUM_EXPERTS, "num_experts_per_tok": 4}
FAMILIES: dict[str, tuple[Any, SoftmaxFamily]] = {
    "olmoe": (
        OlmoeTopKRouter(OlmoeConfig(num_experts=NUM_EXPERTS, **SIZES)),  # type: ignore[arg-type]
        SoftmaxFamily(normalises=False),
    ),
    "qwen3_moe": (
        Qwen3MoeTopKRouter(
            Qwen3MoeConfig(num_experts=NUM_EXPERTS, norm_topk_prob=True, **SIZES)  # type: ignore[arg-type]
        ),
        SoftmaxFamily(normalises=True),
    ),
    "mixtral": (
        MixtralTopKRouter(MixtralConfig(num_local_experts=NUM_EXPERTS, **SIZES)),  # type: ignore[arg-type]
        SoftmaxFamily(normalises=True, weights_dtype=torch.float32),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keeping_all_slots_gives_what_transformers_own_router_gives(
    name: str, dtype: torch.dtype
) -> None:
    router, family = FAMILIES[name]
    # The unit matrix as weight: the logits are the hidden states, each row a permutation of
    # numbers that don't tie.
    router.weight.data = torch.eye(NUM_EXPERTS, dtype=dtype)
    logits_TE = torch.rand(50, NUM_EXPERTS, generator=torch.Generator().manual_seed(0)).argsort(-1)
    with torch.no_grad():
        _, weights_TK, index_TK = router((logits_TE / 4 - 2).to(dtype))
    rule = TopK(4)
    route = reference_router(rule, context_for(rule, NUM_EXPERTS, model_top_k=4), family)
    slots = route((logits_TE / 4 - 2).to(dtype))
    assert torch.equal(slots.top_k_index_TK, index_TK)
    assert torch.equal(slots.top_k_weights_TK, weights_TK)
    assert slots.top_k_weights_TK.dtype == weights_TK.dtype


def test_a_dropped_slot_weighs_nothing_and_names_the_best_expert() -> None:
    rule = BenjaminiHochberg(0.05)
    slots = reference_router(rule, context_for(rule), SoftmaxFamily(normalises=False))(
        random_logits(60)
    )
    best_TK = slots.top_k_index_TK[:, :1].expand_as(slots.top_k_index_TK)
    assert torch.equal(slots.top_k_index_TK[~slots.keep_TK], best_TK[~slots.keep_TK])
    assert not slots.top_k_weights_TK[~slots.keep_TK].any()
    assert torch.equal(slots.expert_counts_T, slots.keep_TK.sum(-1))
    assert slots.expert_counts_T.unique().numel() > 3


@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.parametrize("refill", [None, 9, 12])
def test_refilling_leaves_the_scale_that_a_step_of_one_token_compares(
    refill: int | None, normalises: bool
) -> None:
    family = SoftmaxFamily(normalises=normalises)
    context = context_for(ContributionThreshold(0.1))
    by_step = reference_router(FisherMass(0.1, refill=refill), context, family)
    by_token = reference_router(ContributionThreshold(0.1), context, family)
    for row_E in random_logits(60).unsqueeze(1):
        step, token = by_step(row_E), by_token(row_E)
        assert torch.equal(step.keep_TK[:, :8], token.keep_TK)
        assert not step.keep_TK[:, 8:].any()
