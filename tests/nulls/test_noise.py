"""The all-noise control tells error rates from knobs."""

from __future__ import annotations

import pytest

from bh_routing.errors import InputError
from bh_routing.nulls import NoiseResult, noise_control

ALPHAS = (0.01, 0.05, 0.10)


def control(null: str, **changes: int) -> list[NoiseResult]:
    sizes = {"num_experts": 64, "model_top_k": 8, "tokens": 10_000, "seed": 0} | changes
    return noise_control(null, alphas=ALPHAS, **sizes)


def test_the_background_null_rejects_pure_noise_so_its_alpha_is_a_knob() -> None:
    results = control("background")
    assert [result.alpha for result in results] == list(ALPHAS)
    assert all(result.share_any_low > 0.9 for result in results)
    # 10,000 tokens, seed 0; the standard error of these means is about 0.02.
    means = [result.mean_experts for result in results]
    assert means == pytest.approx([4.2, 5.6, 6.3], abs=0.15)


def test_the_pooled_null_rejects_noise_at_alpha() -> None:
    # The reference is the noise itself, so p-values are uniform: the interval covers alpha.
    for result in control("pooled"):
        assert result.share_any_low <= result.alpha * 1.1
        assert result.share_any_high >= result.alpha * 0.9
        assert result.mean_experts == pytest.approx(1.0, abs=0.05)


def test_the_gaussian_null_exceeds_alpha_by_what_estimating_its_scale_costs() -> None:
    few = control("gaussian")[1].share_any
    many = control("gaussian", num_experts=1_024, tokens=3_000)[1].share_any
    assert 0.09 < few < 0.13
    assert many < 0.075


def test_the_softmax_null_rejects_nothing_and_min_k_keeps_one() -> None:
    for result in control("softmax"):
        assert (result.mean_experts, result.mean_rejected, result.share_any) == (1.0, 0.0, 0.0)


def test_the_interval_holds_the_share_and_narrows_with_more_tokens() -> None:
    small, large = control("gaussian", tokens=500)[2], control("gaussian")[2]
    for result in (small, large):
        assert result.share_any_low < result.share_any < result.share_any_high
    assert large.share_any_high - large.share_any_low < small.share_any_high - small.share_any_low


def test_the_same_seed_gives_the_same_result_and_another_does_not() -> None:
    assert control("background", tokens=500) == control("background", tokens=500)
    assert control("background", tokens=500) != control("background", tokens=500, seed=1)


def test_an_unknown_null_is_refused() -> None:
    with pytest.raises(InputError, match="unknown null"):
        control("uniform")
