"""The fused routers of rules on decode steps, on a GPU or by Triton's interpreter.

Axes: B tokens of a step, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bh_routing.kernels.router import fused_step_router, served_step_router
from bh_routing.rules import (
    BenjaminiHochbergDrop,
    ExpertBudget,
    FisherMass,
    OpportunisticActivation,
    Rule,
    TopK,
)
from bh_routing.rules.router import RoutedSlots, SoftmaxFamily, reference_router
from tests.kernels.test_router import FINE, NORMALISED, RAW, assert_same
from tests.rules.proposals import context_for, random_logits

RULES: list[Rule] = [
    FisherMass(0.25),
    FisherMass(0.4, min_k=2),
    BenjaminiHochbergDrop(0.3, scope="step"),
    BenjaminiHochbergDrop(0.6, scope="step", min_k=2),
    BenjaminiHochbergDrop(0.3, scope="step_population"),
    OpportunisticActivation(3),
    ExpertBudget(12),
    ExpertBudget(9, by="fisher_mass", min_k=2),
    FisherMass(0.3, refill=12),
    BenjaminiHochbergDrop(0.5, scope="step", refill=20),
    OpportunisticActivation(2, refill=30),
    FisherMass(0.3, temperature=0.5),
]


def route_both(
    rule: Rule, num_tokens: int, device: str, family: SoftmaxFamily = FINE, num_experts: int = 64,
    top_k: int = 8, is_real_BS: Tensor | None = None,
) -> tuple[RoutedSlots, RoutedSlots]:  # fmt: skip
    """Return the fused router's slots and the reference's of one step."""
    context = context_for(rule, num_experts, top_k, device)
    fused = fused_step_router(rule, context, family)
    assert fused is not None
    logits_TE = random_logits(num_tokens, num_experts).bfloat16().to(device)
    reference = reference_router(rule, context, family)
    if is_real_BS is None:
        return fused(logits_TE), reference(logits_TE)
    is_real_BS = is_real_BS.to(device)
    routed = fused(logits_TE, is_real_BS), reference(logits_TE, is_real_BS)
    for slots in routed:  # the index of a token without slots is of no use
        slots.top_k_index_TK[~is_real_BS.flatten()] = 0
    return routed


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 24, 64])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_kernels_decide_like_their_reference(
    rule: Rule,
    num_tokens: int,
    device: str,
) -> None:
    fused, reference = route_both(rule, num_tokens, device)
    assert_same(fused, reference)
    kept = int(reference.expert_counts_T.sum())
    assert num_tokens <= kept
    if num_tokens > 1:
        assert kept < reference.keep_TK.numel()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_ended_sequence_neither_votes_nor_counts(rule: Rule, device: str) -> None:
    is_real_B = torch.tensor([True, False, True, True, False, True, True])
    fused, reference = route_both(rule, 7, device, is_real_BS=is_real_B[:, None])
    assert_same(fused, reference)
    context = context_for(rule, device=device)
    logits_TE = random_logits(7).bfloat16().to(device)[is_real_B.to(device)]
    alone = reference_router(rule, context, FINE)(logits_TE)
    assert torch.equal(reference.keep_TK[is_real_B], alone.keep_TK)
    assert not reference.keep_TK[~is_real_B].any()
    assert not reference.top_k_weights_TK[~is_real_B].any()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_in_prefill_a_token_keeps_its_own_top_k(rule: Rule, device: str) -> None:
    is_real_BS = torch.tensor([[True, True, True, False], [True, False, False, False]])
    fused, reference = route_both(rule, 8, device, is_real_BS=is_real_BS)
    assert_same(fused, reference)
    assert reference.expert_counts_T.tolist() == [8, 8, 8, 0, 8, 0, 0, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_served_pass_decides_its_decode_rows_as_a_step(rule: Rule, device: str) -> None:
    context = context_for(rule, device=device)
    served = served_step_router(rule, context, FINE)
    assert served is not None
    kind_T = torch.tensor([2, 1, 1, 0, 1, 2, 1, 1, 0, 1, 1], device=device)
    logits_TE = random_logits(len(kind_T)).bfloat16().to(device)
    logits_TE[4] = float("nan")
    index_TK = torch.full((len(kind_T), 8), -1, dtype=torch.int32, device=device)
    weights_TK = served(logits_TE, kind_T, index_TK)
    assert int(index_TK.min()) >= 0
    assert int(index_TK.max()) < 64
    finite_T = ~logits_TE[:, 0].isnan()

    def by_expert(weights_TK: Tensor, index_TK: Tensor) -> Tensor:
        zeros_TE = weights_TK.new_zeros(len(weights_TK), 64)
        return zeros_TE.scatter_add(-1, index_TK.long(), weights_TK)

    is_voter_T = (kind_T == 1) & finite_T
    slots = reference_router(rule, context, FINE)(logits_TE[is_voter_T])
    wanted_TE = by_expert(slots.top_k_weights_TK, slots.top_k_index_TK)
    found_TE = by_expert(weights_TK[is_voter_T], index_TK[is_voter_T])
    assert torch.equal(found_TE > 0, wanted_TE > 0)
    # The interpreter's exponential rounds otherwise.
    torch.testing.assert_close(found_TE, wanted_TE, rtol=1e-6, atol=0)
    read = set(slots.top_k_index_TK.flatten().tolist())
    assert set(index_TK[is_voter_T].flatten().tolist()) == read
    own = FINE.propose(logits_TE[kind_T == 2], 8)
    assert torch.equal(index_TK[kind_T == 2].long(), own.top_k_index_TK)
    torch.testing.assert_close(weights_TK[kind_T == 2], own.top_k_weights_TK, rtol=1e-6, atol=0)
    assert set(index_TK[kind_T == 0].flatten().tolist()) <= read
    assert not weights_TK[kind_T == 0].any()


@pytest.mark.parametrize("weights", ["model", "renormalize", "preserve_mass"])
@pytest.mark.parametrize("family", [RAW, NORMALISED], ids=["raw", "normalised"])
def test_every_convention_of_weights(
    weights: str,
    family: SoftmaxFamily,
    device: str,
) -> None:
    rule = replace(FisherMass(0.3), weights=weights)  # type: ignore[arg-type]
    assert_same(*route_both(rule, 16, device, replace(family, weights_dtype=torch.float32)))


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 6), (128, 1)])
@pytest.mark.parametrize("rule", RULES[:6:2], ids=str)
def test_any_number_of_experts_and_slots(
    rule: Rule,
    num_experts: int,
    top_k: int,
    device: str,
) -> None:
    assert_same(*route_both(rule, 16, device, FINE, num_experts, top_k))


@pytest.mark.parametrize(
    "rule",
    [
        TopK(4),
        FisherMass(0.3, exponent=1.5),
        FisherMass(0.3, refill=40),
        FisherMass(0.3, temperature=0.5, temperature_weights="raw"),
        BenjaminiHochbergDrop(0.3),
    ],
    ids=str,
)
def test_a_rule_without_a_fused_form_is_left_to_the_reference(
    rule: Rule,
    device: str,
) -> None:
    assert fused_step_router(rule, context_for(rule, device=device), FINE) is None
