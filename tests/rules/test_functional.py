"""The functional form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bh_routing.errors import CalibrationError, InputError
from bh_routing.nulls import ReferenceTable
from bh_routing.rules import benjamini_hochberg_routing
from tests.rules.proposals import random_logits

LOGITS = random_logits(60).view(3, 20, 64)


def test_shapes_are_padded_to_max_k_and_counts_have_the_leading_shape() -> None:
    weights, experts, counts = benjamini_hochberg_routing(LOGITS, max_k=10)
    assert weights.shape == experts.shape == (3, 20, 10)
    assert counts.shape == (3, 20)
    assert torch.equal((experts >= 0).sum(dim=-1), counts)
    assert torch.equal(weights > 0, experts >= 0)


@pytest.mark.parametrize(("num_experts", "model_top_k"), [(64, 8), (8, 2), (4, 4)])
def test_without_max_k_a_token_gets_at_most_the_models_own_k(
    num_experts: int, model_top_k: int
) -> None:
    logits = random_logits(60, num_experts)
    weights, experts, counts = benjamini_hochberg_routing(
        logits, alpha=0.99, null="softmax", temperature=1e-3, model_top_k=model_top_k
    )
    assert weights.shape == experts.shape == (60, model_top_k)
    assert int(counts.max()) <= model_top_k
    wide = benjamini_hochberg_routing(logits, max_k=num_experts, model_top_k=model_top_k)
    assert wide.experts.shape == (60, num_experts)


def test_preserve_mass_is_that_of_the_models_own_k_whatever_max_k_is() -> None:
    own = LOGITS.softmax(dim=-1).topk(4).values.sum(-1)
    for max_k in (2, 4, 10):
        routed = benjamini_hochberg_routing(
            LOGITS, max_k=max_k, model_top_k=4, weights="preserve_mass"
        )
        assert int(routed.counts.max()) <= max_k
        assert torch.allclose(routed.weights.sum(dim=-1), own)


def test_padding_is_minus_1_and_0_and_comes_last() -> None:
    weights, experts, counts = benjamini_hochberg_routing(LOGITS)
    is_padding = torch.arange(8) >= counts.unsqueeze(-1)
    assert torch.equal(experts == -1, is_padding)
    assert bool((weights[is_padding] == 0).all())


def test_experts_come_by_logit_largest_first() -> None:
    _, experts, counts = benjamini_hochberg_routing(LOGITS)
    for row, chosen, count in zip(
        LOGITS.view(-1, 64), experts.view(-1, 8), counts.flatten().tolist(), strict=True
    ):
        assert torch.equal(chosen[:count], row.topk(count).indices)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_raw_weights_are_the_softmax_at_the_temperature(temperature: float) -> None:
    weights, experts, _ = benjamini_hochberg_routing(
        LOGITS, temperature=temperature, temperature_weights="raw"
    )
    expected = (LOGITS / temperature).softmax(dim=-1).gather(-1, experts.clamp_min(0))
    assert torch.allclose(weights, torch.where(experts >= 0, expected, 0.0))


def test_a_temperature_changes_weights_and_not_experts() -> None:
    hot, cold = (benjamini_hochberg_routing(LOGITS, temperature=t) for t in (2.0, 0.5))
    assert torch.equal(hot.experts, cold.experts)
    assert not torch.equal(hot.weights, cold.weights)


def test_weights_follow_the_convention_asked_for() -> None:
    def mass(weights: str, temperature: float) -> Tensor:
        routed = benjamini_hochberg_routing(
            LOGITS, temperature=temperature, weights=weights  # type: ignore[arg-type]
        )  # fmt: skip
        return routed.weights.sum(dim=-1)

    probabilities = LOGITS.softmax(dim=-1)
    experts = benjamini_hochberg_routing(LOGITS).experts
    kept_mass = probabilities.gather(-1, experts.clamp_min(0)).where(experts >= 0, 0.0).sum(-1)
    assert torch.allclose(mass("model", 2.0), kept_mass)
    assert torch.allclose(mass("renormalize", 2.0), torch.ones(3, 20))
    assert torch.allclose(mass("preserve_mass", 2.0), probabilities.topk(8).values.sum(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_floating_dtype_is_taken_and_given_back(dtype: torch.dtype) -> None:
    logits = LOGITS.bfloat16().to(dtype)
    weights, experts, counts = benjamini_hochberg_routing(logits)
    assert weights.dtype == dtype
    assert experts.dtype == counts.dtype == torch.int64
    assert torch.equal(experts, benjamini_hochberg_routing(LOGITS.bfloat16().float()).experts)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (2, 1, 3, 64)])
def test_any_leading_shape_is_taken(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights, experts, counts = benjamini_hochberg_routing(logits)
    assert weights.shape == experts.shape == (*shape[:-1], 8)
    assert counts.shape == shape[:-1]


def test_a_single_expert_is_always_selected() -> None:
    weights, experts, counts = benjamini_hochberg_routing(torch.zeros(4, 1), max_k=1)
    assert weights.tolist() == [[1.0]] * 4
    assert experts.tolist() == [[0]] * 4
    assert counts.tolist() == [1] * 4


def test_ties_go_to_the_lower_expert() -> None:
    _, experts, _ = benjamini_hochberg_routing(torch.zeros(16), min_k=3)
    assert experts.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]


def test_a_tabled_null_takes_its_table() -> None:
    table = ReferenceTable.from_scores(torch.linspace(-2, 2, 10_000))
    _, _, counts = benjamini_hochberg_routing(LOGITS, null="background", table=table)
    assert int(counts.min()) == 1
    assert int(counts.max()) == 8
    assert torch.equal(benjamini_hochberg_routing(LOGITS, table=table).counts, counts)
    with pytest.raises(CalibrationError, match="needs a calibration"):
        benjamini_hochberg_routing(LOGITS, null="background")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\), got 0.0"),
        ({"temperature": -1.0}, "temperature must be a finite number above 0"),
        ({"min_k": 3, "max_k": 2}, "min_k must be at most max_k"),
        ({"max_k": 65}, "max_k must be at most the 64 experts of a layer, got 65"),
        ({"model_top_k": 65}, "model_top_k must be at most the 64 experts of a layer, got 65"),
        ({"model_top_k": 0}, "model_top_k must be a whole number of at least 1, got 0"),
        ({"model_top_k": 2, "min_k": 3}, "min_k must be at most 2, .* got 3; set min_k=2"),
        ({"null": "uniform"}, "unknown null"),
        ({"weights": "softmax"}, "unknown weights 'softmax'; known: model, renormalize"),
        ({"router_logits": torch.tensor([float("nan")] * 8)}, "got 8 NaN or infinite of 8"),
        ({"router_logits": torch.arange(8)}, "floating-point tensor, got torch.int64"),
    ],
)
def test_what_is_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        benjamini_hochberg_routing(**({"router_logits": LOGITS} | changes))
