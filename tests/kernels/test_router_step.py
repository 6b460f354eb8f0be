"""The fused routers of rules on decode steps, on a GPU or by Triton's interpreter.

Axes: B tokens of a step, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bh_routing.kernels.router import fused_step_router
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
]


def route_both(
    rule: Rule, num_tokens: int, device: str, family: SoftmaxFamily = FINE, num_experts: int = 64,
    top_k: int = 8,
) -> tuple[RoutedSlots, RoutedSlots]:  # fmt: skip
    """Return the fused router's slots and the reference's of one step."""
    context = context_for(rule, num_experts, top_k, device)
    fused = fused_step_router(rule, context, family)
    assert fused is not None
    logits_TE = random_logits(num_tokens, num_experts).bfloat16().to(device)
    return fused(logits_TE), reference_router(rule, context, family)(logits_TE)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 24, 64])
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
        assert kept < 8 * num_tokens


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
@pytest.mark.parametrize("rule", RULES[::2], ids=str)
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
        ExpertBudget(20),
        FisherMass(0.3, exponent=1.5),
        FisherMass(0.3, refill=12),
        FisherMass(0.3, temperature=0.5),
        BenjaminiHochbergDrop(0.3),
    ],
    ids=str,
)
def test_a_rule_without_a_fused_form_is_left_to_the_reference(
    rule: Rule,
    device: str,
) -> None:
    assert fused_step_router(rule, context_for(rule, device=device), FINE) is None
