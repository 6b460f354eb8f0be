"""The router in one sort decides as its reference implementation does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bh_routing.kernels.router import (
    RouterPlan,
    SoftmaxFamily,
    _bind,
    reference_router,
    sorted_router,
)
from bh_routing.nulls import ReferenceTable
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg, OnEmpty
from bh_routing.rules.fixed import PerLayerTopK, TopK
from bh_routing.rules.mass import TopP

RULES = [
    TopK(8),
    TopK(3),
    PerLayerTopK((2, 5)),
    BenjaminiHochberg(0.2, max_k=10, null="gaussian"),
    BenjaminiHochberg(0.05, min_k=2, max_k=8, null="background"),
    BenjaminiHochberg(0.001, max_k=8, null="gaussian", on_empty="model_k"),
    BenjaminiHochberg(0.3, max_k=8, null="gaussian", procedure="by"),
    TopK(8, temperature=2.0),
    BenjaminiHochberg(0.05, max_k=8, null="background", temperature=2.0),
]


def make_logits(num_tokens: int, seed: int) -> torch.Tensor:
    """Noise with 0 to 11 signals; every fourth token has ties."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, 64, generator=generator)
    logits_TE += 3 * (torch.arange(64) < (torch.arange(num_tokens) % 12).unsqueeze(-1))
    logits_TE[::4] = (2 * logits_TE[::4]).round() / 2
    return logits_TE


@pytest.fixture(scope="module")
def context() -> LayerContext:
    return LayerContext(
        layer=1,
        num_experts=64,
        model_top_k=8,
        device=torch.device("cpu"),
        table=ReferenceTable.from_scores(make_logits(400, seed=1).flatten()),
    )


@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_it_decides_as_the_reference(rule: Rule, normalises: bool, context: LayerContext) -> None:
    family = SoftmaxFamily(normalises=normalises)
    quick = sorted_router(rule, context, family)
    assert quick is not None
    logits_TE = make_logits(300, seed=2)
    found, expected = quick(logits_TE), reference_router(rule, context, family)(logits_TE)
    assert torch.equal(found.top_k_index_TK, expected.top_k_index_TK)
    assert torch.equal(found.keep_TK.expand_as(expected.keep_TK), expected.keep_TK)
    assert torch.equal(found.expert_counts_T, expected.expert_counts_T)
    torch.testing.assert_close(found.top_k_weights_TK, expected.top_k_weights_TK)
    assert torch.equal(found.top_k_weights_TK != 0, expected.keep_TK)


@pytest.mark.parametrize("model_top_k", [8, 4, 2])
@pytest.mark.parametrize("on_empty", ["min_k", "model_k"])
def test_without_max_k_it_keeps_at_most_the_models_own_k(
    model_top_k: int, on_empty: OnEmpty, context: LayerContext
) -> None:
    rule = BenjaminiHochberg(0.3, null="gaussian", on_empty=on_empty)
    own, family = replace(context, model_top_k=model_top_k), SoftmaxFamily(normalises=True)
    quick, logits_TE = sorted_router(rule, own, family), make_logits(300, seed=2)
    assert quick is not None
    found, expected = quick(logits_TE), reference_router(rule, own, family)(logits_TE)
    assert torch.equal(found.expert_counts_T, expected.expert_counts_T)
    assert int(found.expert_counts_T.max()) == model_top_k


@pytest.mark.parametrize(
    "rule",
    [
        TopP(0.5),
        TopK(8, temperature=2.0, temperature_weights="raw"),
        TopK(4, weights="renormalize"),
    ],
    ids=str,
)
def test_what_needs_more_than_a_sort_is_left_to_the_reference(
    rule: Rule, context: LayerContext
) -> None:
    assert sorted_router(rule, context, SoftmaxFamily(normalises=False)) is None


def test_a_score_exactly_on_its_line_counts(context: LayerContext) -> None:
    # Median 0.5: the scores are 2.5, 0.5, -0.5 and -1.5.
    lines = torch.tensor([9.0, 0.5, 9.0, 9.0])
    plan = RouterPlan(decision="step_up", num_slots=3, max_k=3, lines=lines)
    four = replace(context, num_experts=4)
    route = _bind(plan, four, SoftmaxFamily(normalises=False), temperature=1.0)
    slots = route(torch.tensor([[0.0, 3.0, 1.0, -1.0]]))
    assert slots.expert_counts_T.tolist() == [2]
    assert slots.top_k_index_TK.tolist() == [[1, 2, 1]]


@pytest.mark.parametrize("num_experts", [64, 63])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_token_alone_is_decided_as_among_others(
    rule: Rule, num_experts: int, context: LayerContext
) -> None:
    quick = sorted_router(
        rule, replace(context, num_experts=num_experts), SoftmaxFamily(normalises=False)
    )
    assert quick is not None
    logits_TE = make_logits(300, seed=3)[:, :num_experts]
    logits_TE[7] = 1.0  # all equal: no scale
    logits_TE[8] = torch.where(torch.arange(num_experts) < 5, 2.0, 1.0)  # most equal: no MAD
    logits_TE[9, 3] = torch.nan
    together = quick(logits_TE.contiguous())
    for token, row_E in enumerate(logits_TE):
        alone = quick(row_E.unsqueeze(0).contiguous())
        for found, expected in zip(alone, together, strict=True):
            expected = expected[min(token, len(expected) - 1)].unsqueeze(0)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
