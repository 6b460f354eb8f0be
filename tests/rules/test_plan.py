"""Plans decide alike, whatever the order of the slots and however many tokens there are.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bh_routing.nulls import get_null
from bh_routing.rules import (
    BenjaminiHochberg,
    BenjaminiHochbergDrop,
    FisherMass,
    FloorThreshold,
    HigherCriticism,
    PerLayerTopK,
    Plan,
    Rule,
    TopK,
    Weighing,
)
from bh_routing.rules.base import LayerContext, MixingRule
from bh_routing.rules.plan import interpret
from bh_routing.rules.router import SoftmaxFamily, reference_router
from tests.rules.proposals import MODEL_TOP_K, context_for, kept_experts
from tests.rules.test_conformance import EXAMPLES

PLANNED = [
    rule
    for rules in EXAMPLES.values()
    for rule in rules
    if rule.plan(context_for(rule)) is not None
]
COUNTED = [
    TopK(3),
    PerLayerTopK((5,)),
    BenjaminiHochberg(0.2, max_k=10, null="gaussian"),
    BenjaminiHochberg(0.05, min_k=2),
    BenjaminiHochberg(0.001, null="gaussian", on_empty="model_k"),
    BenjaminiHochberg(0.3, null="background_studentized", procedure="by"),
    BenjaminiHochberg(0.05, temperature=2.0),
    HigherCriticism(2.0, max_k=12),
]


def make_logits(num_tokens: int, num_experts: int, seed: int) -> Tensor:
    """Noise with 0 to 11 signals; every fourth token has ties."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    is_signal_TE = torch.arange(num_experts) < (torch.arange(num_tokens) % 12).unsqueeze(-1)
    logits_TE += 3 * is_signal_TE
    logits_TE[::4] = (2 * logits_TE[::4]).round() / 2
    return logits_TE


@pytest.mark.parametrize("rule", PLANNED, ids=str)
def test_sorted_slots_are_decided_like_slots_in_any_order(rule: Rule) -> None:
    logits_TE = make_logits(300, 64, seed=2)
    # bfloat16 weights tie.
    family = SoftmaxFamily(normalises=False, weights_dtype=torch.bfloat16)
    in_order = family.propose(logits_TE, rule.num_candidates(MODEL_TOP_K))
    assert in_order.sorted_logits_TE is not None
    order_K = torch.randperm(
        in_order.top_k_index_TK.shape[1], generator=torch.Generator().manual_seed(0)
    )
    has_no_ties_T = logits_TE.sort(dim=-1).values.diff(dim=-1).amin(dim=-1) > 0
    shuffled = in_order._replace(
        top_k_index_TK=in_order.top_k_index_TK[:, order_K],
        top_k_weights_TK=in_order.top_k_weights_TK[:, order_K],
        sorted_logits_TE=None,
    )
    select = rule.bind(context_for(rule))
    expected_TE = kept_experts(shuffled, select(shuffled))
    assert torch.equal(
        kept_experts(in_order, select(in_order))[has_no_ties_T], expected_TE[has_no_ties_T]
    )


@pytest.mark.parametrize("num_experts", [64, 63])
@pytest.mark.parametrize("rule", COUNTED, ids=str)
def test_a_token_alone_is_decided_as_among_others(rule: Rule, num_experts: int) -> None:
    context = context_for(rule, num_experts)
    route = reference_router(rule, context, SoftmaxFamily(normalises=False))
    logits_TE = make_logits(300, num_experts, seed=3)
    logits_TE[7] = 1.0  # all equal: no scale
    logits_TE[8] = torch.where(torch.arange(num_experts) < 5, 2.0, 1.0)  # most equal: no MAD
    logits_TE[9, 3] = torch.nan
    together = route(logits_TE)
    for token, row_E in enumerate(logits_TE):
        for found, expected in zip(route(row_E.unsqueeze(0)), together, strict=True):
            torch.testing.assert_close(
                found, expected[token : token + 1], rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("copies", [1, 2])
def test_a_score_exactly_on_its_line_counts(copies: int) -> None:
    # Median 0.5: the scores are 2.5, 0.5, -0.5 and -1.5; only rank 2 reaches its critical value.
    lines = torch.tensor([9.0, 0.5, 9.0, 9.0])
    plan = Plan(decision="step_up", null=get_null("background"), max_k=3, lines=lines)
    logits_TE = torch.tensor([[0.0, 3.0, 1.0, -1.0]]).expand(copies, -1)
    slots = SoftmaxFamily(normalises=False).propose(logits_TE, 3)
    assert interpret(plan)(slots).tolist() == [[True, True, False]] * copies
    below = replace(plan, lines=lines.nextafter(torch.tensor(9.0)))
    assert interpret(below)(slots).tolist() == [[True, False, False]] * copies


@pytest.mark.parametrize(
    "rule", [TopK(3), BenjaminiHochberg(0.05, max_k=12), FloorThreshold(3, 0.4)], ids=str
)
@pytest.mark.parametrize("normalises", [False, True])
def test_a_dropped_slot_is_aliased_alike_in_sorted_slots_and_in_others(
    rule: Rule, normalises: bool
) -> None:
    weighing = Weighing.of(rule, normalises=normalises, model_top_k=MODEL_TOP_K)
    num_slots = rule.num_candidates(MODEL_TOP_K)
    slots = SoftmaxFamily(normalises=normalises).propose(make_logits(100, 64, seed=4), num_slots)
    keep_TK = rule.bind(context_for(rule))(slots)
    quick, plain = (
        weighing.route(c, keep_TK) for c in (slots, slots._replace(sorted_logits_TE=None))
    )
    assert not keep_TK.all()
    assert all(torch.equal(one, other) for one, other in zip(quick, plain, strict=True))


@pytest.mark.parametrize(
    "rule",
    [
        BenjaminiHochberg(0.1, null="per_expert"),
        BenjaminiHochbergDrop(0.4, scope="block"),
        BenjaminiHochbergDrop(0.4, scope="step"),
        FisherMass(0.3),
    ],
    ids=str,
)
def test_what_slots_of_one_token_cannot_decide_has_no_plan(rule: Rule) -> None:
    assert rule.plan(context_for(rule)) is None
    assert rule.bind(context_for(rule)) is not None


def test_a_rule_with_neither_a_plan_nor_a_selector_says_so() -> None:
    @dataclass(frozen=True)
    class Undecided(MixingRule):
        method: ClassVar[str] = "undecided"

    context = LayerContext(layer=0, num_experts=4, model_top_k=2, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="Undecided has neither a plan nor"):
        Undecided().bind(context)
