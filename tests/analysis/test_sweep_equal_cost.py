"""The paired difference from a curve at the same measured mean."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bh_routing.analysis import sweep_equal_cost
from bh_routing.analysis.sweep_equal_cost import Curve, EqualCost, compare_at_equal_cost
from bh_routing.analysis.sweep_records import ScoredText
from bh_routing.stats.clustered import estimate_ratio
from bh_routing.stats.paired import holm
from tests.analysis.swept import scored_text

STATIC = Curve(name="top_k", config_names=("four", "five", "six"), widest=1.0)


def small_text(rule_experts: tuple[float, ...] = (4.0, 5.0, 4.5, 4.5)) -> ScoredText:
    return scored_text(
        [10, 20, 30, 40],
        {
            "rule": (0.10, 0.20, 0.10, 0.15),
            "four": (0.30, 0.40, 0.20, 0.25),
            "five": (0.10, 0.30, 0.10, 0.10),
            "six": (0.00, 0.10, 0.05, 0.00),
        },
        {"rule": rule_experts, "four": (4,) * 4, "five": (5,) * 4, "six": (6,) * 4},
    )


def compared(text: ScoredText, curve: Curve = STATIC, **options: object) -> EqualCost:
    settings = {"resamples": 400, "seed": 0} | options
    found = compare_at_equal_cost(text, ["rule"], [curve], **settings)  # type: ignore[arg-type]
    return found["rule", curve.name]


def test_a_small_table_comes_out_as_by_hand() -> None:
    # Over 100 tokens: rule 14/100 at 455/100 experts; four 27/100, five 14/100.
    found = compared(small_text())
    line = 0.45 * 0.27 + 0.55 * 0.14
    assert found.at_mean == pytest.approx(line)
    assert found.difference == pytest.approx(0.14 - line)
    assert found.saved == pytest.approx(1 - math.expm1(0.14) / math.expm1(line))
    assert found.geometric == pytest.approx(0.27**0.45 * 0.14**0.55)
    # Four documents: Student's t of the linearised document values.
    share = np.array([4.0, 5.0, 4.5, 4.5]) - 4.55
    own, four, five = np.array([[0.10, 0.20, 0.10, 0.15], [0.30, 0.40, 0.20, 0.25],
                                [0.10, 0.30, 0.10, 0.10]])  # fmt: skip
    values = own - 0.14 - 0.45 * (four - 0.27) - 0.55 * (five - 0.14) - (0.14 - 0.27) * share
    weights = np.array([10.0, 20, 30, 40])
    expected = estimate_ratio(found.difference * weights + values * weights, weights, range(4))
    assert [found.low, found.high] == pytest.approx(np.ravel(expected.interval()).tolist())
    assert found.p == pytest.approx(expected.p_different()[0])


@pytest.mark.parametrize("shift", [0.0, 0.03])
@pytest.mark.parametrize("documents", [4, 40])
def test_the_variance_between_draws_of_companions_widens_the_interval(
    documents: int, shift: float
) -> None:
    rng, number = np.random.default_rng(0), np.arange(2 * documents) % documents
    loss = rng.uniform(0.1, 0.2, documents)[number]
    loss[documents:] += shift
    flat = np.ones(2 * documents)
    losses = {"rule": loss, "four": 0.3 * flat, "five": 0.2 * flat, "six": 0.1 * flat}
    experts = {"rule": 4.5 * flat, "four": 4 * flat, "five": 5 * flat, "six": 6 * flat}
    text = scored_text(flat, losses, experts)  # type: ignore[arg-type]
    text = replace(text, clusters_D=text.clusters_D[number])
    plain = compared(text)
    drawn = compared(replace(text, draws_D=np.arange(2 * documents) // documents))
    weights, books = flat, [str(i) for i in number]
    se, both = (
        float(estimate_ratio(loss, weights, books, draws=draws, resamples=400).se_R[0])
        for draws in (None, np.arange(2 * documents) // documents)
    )
    assert both == pytest.approx(math.hypot(se, shift / 2))
    assert drawn.difference == plain.difference
    widened = (drawn.high - drawn.low) / (plain.high - plain.low)
    assert widened == pytest.approx(both / se)
    assert (drawn.p > plain.p) or shift == 0 or documents == 40


@pytest.mark.parametrize("name", ["_difference", "_fraction_saved"])
def test_derivatives_are_those_of_small_steps(name: str) -> None:
    function = getattr(sweep_equal_cost, name)
    # Loss of the rule and of three points, then mean experts of the same.
    at_J = np.array([0.2, 0.5, 0.3, 0.1, 4.6, 3.9, 5.1, 6.05])
    step = 1e-6
    slopes = [
        (function(at_J[None] + step * e)[0][0] - function(at_J[None] - step * e)[0][0]) / (2 * step)
        for e in np.eye(len(at_J))
    ]
    assert function(at_J[None])[1][0] == pytest.approx(slopes, abs=1e-7)


@pytest.mark.parametrize("mean", [3.9, 6.1])
def test_nothing_is_extrapolated(mean: float) -> None:
    found = compared(small_text((mean,) * 4))
    assert all(math.isnan(getattr(found, name)) for name in ("at_mean", "difference", "p", "low"))
    assert f"{mean:.2f} experts" in found.note
    assert "nothing is extrapolated" in found.note


def test_a_gap_wider_than_allowed_is_not_bridged() -> None:
    gappy = Curve(name="top_k", config_names=("four", "six"), widest=1.0)
    assert math.isnan(compared(small_text(), gappy).difference)
    wide = Curve(name="top_k", config_names=("four", "six"), widest=2.0)
    assert math.isfinite(compared(small_text(), wide).difference)


def random_text(num_documents: int = 40, seed: int = 0, shift: float = 0.0) -> ScoredText:
    rng = np.random.default_rng(seed)
    hard = rng.exponential(1.0, num_documents) - 1.0
    noise = rng.normal(0, 0.02, (4, num_documents))
    losses = {
        "rule": 0.15 + shift + 0.05 * hard + noise[0],
        "four": 0.25 + 0.08 * hard + noise[1],
        "five": 0.11 + 0.04 * hard + noise[2],
        "six": 0.05 + 0.02 * hard + noise[3],
    }
    experts = {
        "rule": 4.75 + 0.2 * hard,
        **{name: np.full(num_documents, k) for name, k in (("four", 4), ("five", 5), ("six", 6))},
    }
    return scored_text(
        np.round(rng.lognormal(6, 0.4, num_documents)).tolist(),
        {n: v.tolist() for n, v in losses.items()},
        {n: v.tolist() for n, v in experts.items()},
    )


def test_the_uncertainty_of_the_mean_is_in_the_interval() -> None:
    text = random_text()
    fixed = random_text()
    own = fixed.cost_DC[:, 0]
    own[:] = fixed.tokens_D * own.sum() / fixed.tokens_D.sum()
    varying, constant = compared(text, resamples=2000), compared(fixed, resamples=2000)
    assert varying.difference == pytest.approx(constant.difference)
    # A hard document has more experts: its loss is partly paid for, so pairing narrows here.
    assert (varying.high - varying.low) / (constant.high - constant.low) != pytest.approx(1, 0.05)


def test_a_joint_interval_is_wider_than_one_alone_and_p_is_holms() -> None:
    text = random_text()
    alone = compared(text, resamples=2000, simultaneous=False)
    found = compare_at_equal_cost(
        text, ["rule", "five"],
        [STATIC, Curve(name="other", config_names=("four", "six"), widest=2.0)],
        resamples=2000, seed=0,
    )  # fmt: skip
    assert set(found) == {("rule", "top_k"), ("rule", "other"), ("five", "other")}
    joint = found["rule", "top_k"]
    assert joint.low < alone.low < alone.high < joint.high
    p = [one.p for one in found.values()]
    assert [one.p_corrected for one in found.values()] == holm(p).tolist()


def test_the_same_losses_everywhere_give_no_interval_but_a_reason() -> None:
    text = random_text()
    text.losses_DC[:, 0], text.cost_DC[:, 0] = text.losses_DC[:, 2], text.cost_DC[:, 2]
    found = compared(text)
    assert found.difference == pytest.approx(0, abs=1e-12)
    assert math.isnan(found.low)
    assert "no spread" in found.note


def test_a_reference_without_loss_leaves_nothing_to_save() -> None:
    text = random_text()
    text.losses_DC[:, 1:] = 0.0
    found = compared(text)
    assert math.isfinite(found.difference + found.low)
    assert math.isnan(found.saved)
    assert "no part of it" in found.note


def test_two_clusters_give_an_estimate_alone() -> None:
    found = compared(random_text(num_documents=2))
    assert math.isfinite(found.difference)
    assert math.isnan(found.low)
    assert "clusters" in found.note


def test_an_end_between_unknown_resamples_is_unknown() -> None:
    t_B = np.where(np.arange(1000) % 2 == 0, math.nan, 0.5)
    ends = sweep_equal_cost._intervals([(0.1, 0.2, t_B)], 40, simultaneous=False)
    assert np.isnan(ends[0]).all() and np.isnan(ends[1]).all()


def test_a_test_without_an_interval_of_its_own_leaves_the_others_theirs() -> None:
    rng = np.random.default_rng(0)
    ordinary = (0.1, 0.2, rng.standard_normal(1000))
    without_spread = (0.1, 1e-12, np.where(np.arange(1000) % 2 == 0, np.inf, -np.inf))
    alone = sweep_equal_cost._intervals([ordinary], 40, simultaneous=True)
    joint = sweep_equal_cost._intervals([ordinary, without_spread], 40, simultaneous=True)
    assert joint.low_R[0] == alone.low_R[0]
    assert joint.high_R[0] == alone.high_R[0]
    assert np.isnan([joint.low_R[1], joint.high_R[1]]).all()
