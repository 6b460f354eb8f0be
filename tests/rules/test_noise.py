"""The all-noise control tells error rates from knobs, and runs the rule itself."""

from __future__ import annotations

import pytest
import torch

from bh_routing.errors import InputError
from bh_routing.experiments.calibrating import describe_nulls
from bh_routing.experiments.configurations import NamedRule
from bh_routing.multitest import benjamini_hochberg, benjamini_yekutieli, storey
from bh_routing.nulls import get_null
from bh_routing.rules import BenjaminiHochberg, NoiseResult, noise_control
from bh_routing.rules.noise import fit_on_noise

ALPHAS = (0.01, 0.05, 0.10)
REJECT = {"bh": benjamini_hochberg, "by": benjamini_yekutieli, "storey": storey}


def control(null: str, **changes: int) -> list[NoiseResult]:
    sizes = {"num_experts": 64, "model_top_k": 8, "tokens": 10_000, "seed": 0} | changes
    return noise_control([BenjaminiHochberg(alpha, null=null) for alpha in ALPHAS], **sizes)


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


@pytest.mark.parametrize(
    "rule",
    [
        BenjaminiHochberg(0.05, procedure="by"),
        BenjaminiHochberg(0.05, procedure="storey"),
        BenjaminiHochberg(0.05, max_k=4),
        BenjaminiHochberg(0.05, min_k=6),
        BenjaminiHochberg(0.05, max_k=16),
        BenjaminiHochberg(0.05, null="gaussian", on_empty="model_k"),
        BenjaminiHochberg(0.1, null="pooled", procedure="by", on_empty="model_k", max_k=5),
        BenjaminiHochberg(0.1, null="gaussian", procedure="storey", min_k=3, max_k=12),
        BenjaminiHochberg(0.9, null="softmax", temperature=0.1, on_empty="model_k", max_k=12),
    ],
    ids=str,
)
def test_the_figures_on_noise_are_those_of_the_rule_with_its_procedure_and_its_limits(
    rule: BenjaminiHochberg,
) -> None:
    (result,) = noise_control([rule], num_experts=64, model_top_k=8, tokens=2_000)
    generator, null = torch.Generator().manual_seed(0), get_null(rule.null)
    table = fit_on_noise(null, 64, 8, generator)
    logits_TE = torch.randn(2_000, 64, generator=generator)
    p_TE = null.p_from_score(null.score(logits_TE, rule.temperature), table)
    rejected = [int(n) for n in REJECT[rule.procedure](p_TE, rule.alpha).sum(dim=-1)]
    empty = 8 if rule.on_empty == "model_k" else 0
    kept = [min(max(n or empty, rule.min_k), rule.max_k or 8) for n in rejected]
    assert result.mean_experts == pytest.approx(sum(kept) / 2_000)
    assert result.mean_rejected == pytest.approx(sum(rejected) / 2_000)
    assert result.share_any == pytest.approx(sum(n > 0 for n in rejected) / 2_000)


def test_with_tables_by_expert_a_rule_keeps_its_rejected_slots_of_noise() -> None:
    rules = [BenjaminiHochberg(0.05, null="per_expert", max_k=k) for k in (2, 8, 12)]
    few, own, many = noise_control(rules, num_experts=16, model_top_k=8, tokens=500)
    assert few.mean_experts <= 2 < own.mean_experts < many.mean_experts
    assert few.mean_rejected == own.mean_rejected == many.mean_rejected


def test_a_rule_meets_the_same_noise_alone_and_among_others() -> None:
    rules = [BenjaminiHochberg(0.05), BenjaminiHochberg(0.1, null="pooled"), BenjaminiHochberg(0.1)]
    together = noise_control(rules, num_experts=16, model_top_k=4, tokens=200)
    alone = [noise_control([r], num_experts=16, model_top_k=4, tokens=200)[0] for r in rules]
    assert together == alone


def test_a_run_describes_each_configuration_on_noise_by_its_name() -> None:
    rules = {
        "plain": BenjaminiHochberg(0.05, null="gaussian"),
        "own_k": BenjaminiHochberg(0.05, null="gaussian", on_empty="model_k"),
        "low": BenjaminiHochberg(0.01, null="softmax", min_k=3),
    }
    named = [NamedRule(name, "", rule) for name, rule in rules.items()]
    gaussian, softmax = describe_nulls(named, num_experts=64, model_top_k=8, seed=0)
    kept = {entry["config_name"]: entry["mean_experts"] for entry in gaussian["noise"]}
    assert kept == pytest.approx({"plain": 1.05, "own_k": 7.28}, abs=0.05)
    assert [(entry["config_name"], entry["mean_experts"]) for entry in softmax["noise"]] == [
        ("low", 3.0)
    ]


def test_a_rule_that_does_not_fit_is_rejected() -> None:
    with pytest.raises(InputError, match="max_k must be at most the 8 experts"):
        noise_control([BenjaminiHochberg(0.05, max_k=9)], num_experts=8, model_top_k=2)
