"""Weights of the kept slots. Axes: T tokens, E experts, K slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bh_routing.rules import Candidates, TopK, Weighing, alias_dropped
from tests.rules.proposals import context_for, propose, random_logits

LOGITS_TE = random_logits(100)
RAW = propose(LOGITS_TE, shuffled=True)


def normalised(candidates: Candidates, scale: float = 1.0) -> Candidates:
    """The same slots as a family that renormalises proposes them."""
    weights_TK = candidates.top_k_weights_TK
    return candidates._replace(
        top_k_weights_TK=scale * weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    )


def keep(candidates: Candidates, k: int) -> Tensor:
    rule = TopK(k)
    return rule.bind(context_for(rule))(candidates)


def weigh(candidates: Candidates, keep_TK: Tensor, **changes: Any) -> Tensor:
    arguments: dict[str, Any] = {"normalises": False, "model_top_k": 8} | changes
    return Weighing(**arguments).weights(candidates, keep_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("normalises", "convention"),
    [(False, "model"), (True, "model"), (False, "preserve_mass"), (True, "preserve_mass")],
)
def test_keeping_everything_returns_the_familys_weights_bit_for_bit(
    dtype: torch.dtype, normalises: bool, convention: str
) -> None:
    candidates = normalised(RAW, scale=2.5) if normalises else RAW
    candidates = candidates._replace(top_k_weights_TK=candidates.top_k_weights_TK.to(dtype))
    all_TK = torch.ones_like(candidates.top_k_index_TK, dtype=torch.bool)
    ours_TK = weigh(candidates, all_TK, normalises=normalises, convention=convention)
    assert ours_TK.dtype == dtype
    assert torch.equal(ours_TK, candidates.top_k_weights_TK)


def test_a_family_that_does_not_renormalise_keeps_its_raw_weights() -> None:
    keep_TK = keep(RAW, 3)
    expected_TK = torch.where(keep_TK, RAW.top_k_weights_TK, 0.0)
    assert torch.equal(weigh(RAW, keep_TK), expected_TK)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_family_that_renormalises_does_so_over_the_kept_slots_at_its_own_scale(
    scale: float,
) -> None:
    candidates, keep_TK = normalised(RAW, scale), keep(RAW, 3)
    ours_TK = weigh(candidates, keep_TK, normalises=True)
    own = propose(LOGITS_TE, 3)  # what the family would give with k = 3
    expected_TE = torch.zeros_like(LOGITS_TE).scatter(
        -1, own.top_k_index_TK, normalised(own, scale).top_k_weights_TK
    )
    ours_TE = torch.zeros_like(LOGITS_TE).scatter(-1, RAW.top_k_index_TK, ours_TK)
    assert torch.allclose(ours_TE, expected_TE, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_renormalize_makes_the_kept_weights_sum_to_1(temperature: float) -> None:
    ours_TK = weigh(RAW, keep(RAW, 3), convention="renormalize", temperature=temperature)
    assert torch.allclose(ours_TK.sum(dim=-1), torch.ones(100))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_preserve_mass_keeps_the_sum_of_the_models_own_slots(temperature: float) -> None:
    wide = propose(LOGITS_TE, 12, shuffled=True)
    ours_TK = weigh(wide, keep(wide, 10), convention="preserve_mass", temperature=temperature)
    own_mass_T = LOGITS_TE.softmax(dim=-1).topk(8).values.sum(dim=-1)
    assert torch.allclose(ours_TK.sum(dim=-1), own_mass_T)


def test_widening_keeps_the_constant_sum_of_a_family_that_renormalises() -> None:
    wide = normalised(propose(LOGITS_TE, 12), scale=2.5)
    for convention in ("model", "preserve_mass"):
        ours_TK = weigh(wide, keep(wide, 5), normalises=True, convention=convention)
        assert torch.allclose(ours_TK.sum(dim=-1), torch.full((100,), 2.5))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("normalises", [False, True])
def test_a_temperature_flattens_the_mixture_and_keeps_the_mass_at_temperature_1(
    temperature: float, normalises: bool
) -> None:
    candidates = normalised(RAW) if normalises else RAW
    keep_TK = keep(RAW, 4)
    plain_TK = weigh(candidates, keep_TK, normalises=normalises)
    ours_TK = weigh(candidates, keep_TK, normalises=normalises, temperature=temperature)
    assert torch.allclose(ours_TK.sum(dim=-1), plain_TK.sum(dim=-1))
    # Proportional to exp(logit / T): log-ratios are logit differences over T.
    logits_TK = LOGITS_TE.gather(-1, RAW.top_k_index_TK)
    for token in range(20):
        kept = keep_TK[token]
        log_ratio = ours_TK[token, kept].log().diff()
        assert torch.allclose(log_ratio, logits_TK[token, kept].diff() / temperature, atol=1e-4)


def test_raw_temperature_weights_are_the_familys_own_softmax() -> None:
    keep_TK = keep(RAW, 4)
    ours_TK = weigh(RAW, keep_TK, temperature=2.0, temperature_weights="raw")
    expected_TK = (LOGITS_TE / 2).softmax(dim=-1).gather(-1, RAW.top_k_index_TK)
    assert torch.allclose(ours_TK, torch.where(keep_TK, expected_TK, 0.0), atol=1e-6)


def test_raw_equals_mass_in_a_family_that_renormalises() -> None:
    candidates, keep_TK = normalised(RAW), keep(RAW, 4)
    raw_TK, mass_TK = (
        weigh(candidates, keep_TK, normalises=True, temperature=2.0, temperature_weights=way)
        for way in ("raw", "mass")
    )
    assert torch.equal(raw_TK, mass_TK)


@pytest.mark.parametrize("convention", ["model", "renormalize", "preserve_mass"])
@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_weights_stay_finite_where_the_router_is_certain(
    convention: str, normalises: bool, temperature: float
) -> None:
    logits = torch.zeros(1, 64)
    logits[0, :3] = torch.tensor([200.0, 90.0, -200.0])
    candidates = propose(logits)
    ours_TK = weigh(
        candidates,
        keep(candidates, 2),
        convention=convention,
        normalises=normalises,
        temperature=temperature,
    )
    assert ours_TK.isfinite().all()
    assert float(ours_TK.sum()) == pytest.approx(1.0)


def test_weights_of_0_stay_0_and_finite() -> None:
    zero = RAW._replace(top_k_weights_TK=torch.zeros_like(RAW.top_k_weights_TK))
    for convention in ("model", "renormalize", "preserve_mass"):
        ours_TK = weigh(zero, keep(RAW, 2), convention=convention, normalises=True)
        assert torch.equal(ours_TK, zero.top_k_weights_TK)


def test_a_dropped_slot_takes_the_tokens_best_kept_expert_with_weight_exactly_0() -> None:
    index, weights = alias_dropped(
        torch.tensor([[7, 3, 5], [1, 2, 4]]),
        torch.tensor([[0.2, 0.1, 0.6], [0.3, 0.4, 0.2]]),
        torch.tensor([[True, False, True], [True, False, False]]),
    )
    assert index.tolist() == [[7, 5, 5], [1, 1, 1]]
    assert torch.equal(weights, torch.tensor([[0.2, 0.0, 0.6], [0.3, 0.0, 0.0]]))


def test_aliasing_with_everything_kept_changes_nothing() -> None:
    all_TK = torch.ones_like(RAW.top_k_index_TK, dtype=torch.bool)
    index, weights = alias_dropped(RAW.top_k_index_TK, RAW.top_k_weights_TK, all_TK)
    assert torch.equal(index, RAW.top_k_index_TK)
    assert torch.equal(weights, RAW.top_k_weights_TK)


def test_a_dropped_nan_weight_does_not_survive() -> None:
    _, weights = alias_dropped(
        torch.tensor([[0, 1]]),
        torch.tensor([[0.5, float("nan")]]),
        torch.tensor([[True, False]]),
    )
    assert weights.tolist() == [[0.5, 0.0]]


def test_aliased_slots_mix_the_same_output_as_the_kept_ones() -> None:
    keep_TK = keep(RAW, 3)
    outputs_EH = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    weights_TK = weigh(RAW, keep_TK)
    index, weights = alias_dropped(RAW.top_k_index_TK, weights_TK, keep_TK)
    mixed_TH = (weights.unsqueeze(-1) * outputs_EH[index]).sum(dim=1)
    expected_TE = torch.zeros_like(LOGITS_TE).scatter(-1, RAW.top_k_index_TK, weights_TK)
    assert torch.allclose(mixed_TH, expected_TE @ outputs_EH, atol=1e-5)
    assert bool(index.unsqueeze(-1).eq(RAW.top_k_index_TK[keep_TK].view(100, 1, 3)).any(-1).all())
