from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bh_routing.analysis.task_outcomes import TaskComparison, compare_tasks
from bh_routing.errors import InputError
from bh_routing.results.records import TaskOutcome


def outcome(
    config: str,
    item: int,
    metrics: dict[str, float | list[float]],
    *,
    cluster: str = "",
    item_hash: str = "",
) -> TaskOutcome:
    return TaskOutcome(
        config_name=config,
        task="quiz",
        filter="none",
        item=item,
        item_hash=item_hash or f"hash {item}",
        cluster=cluster or str(item),
        metrics=metrics,
    )


def answers(config: str, right: list[int], cluster_size: int = 1) -> list[TaskOutcome]:
    return [
        outcome(config, i, {"acc": float(value)}, cluster=f"document {i // cluster_size}")
        for i, value in enumerate(right)
    ]


def only(comparisons: list[TaskComparison]) -> TaskComparison:
    (comparison,) = comparisons
    return comparison


REFERENCE = [1] * 40 + [0] * 20
RULE = [1] * 30 + [0] * 10 + [1] * 2 + [0] * 18
"""Ten lost, two gained."""


def test_flips_of_a_right_or_wrong_metric_get_the_exact_mcnemar_test() -> None:
    found = only(compare_tasks([*answers("topk", REFERENCE), *answers("bh", RULE)], "topk"))
    assert (found.lost, found.gained, found.share_flipped) == (10, 2, 12 / 60)
    assert found.p == pytest.approx(stats.binomtest(2, 12).pvalue)
    assert found.difference == pytest.approx(-8 / 60)
    assert found.low < -8 / 60 < found.high < 0


def test_the_order_of_outcomes_does_not_matter() -> None:
    outcomes = [*answers("topk", REFERENCE), *answers("bh", RULE)]
    assert compare_tasks(outcomes[::-1], "topk") == compare_tasks(outcomes, "topk")


def test_items_of_one_document_widen_the_interval_and_the_note_says_why() -> None:
    alone = only(compare_tasks([*answers("topk", REFERENCE), *answers("bh", RULE)], "topk"))
    clustered = only(
        compare_tasks([*answers("topk", REFERENCE, 10), *answers("bh", RULE, 10)], "topk")
    )
    assert clustered.num_clusters == 6
    assert clustered.high - clustered.low > alone.high - alone.low
    assert "McNemar takes the 60 items as independent; they are from 6 documents." in clustered.note
    assert "independent" not in alone.note


def test_sums_with_weights_give_the_ratio_of_sums() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(50, 500, size=40).astype(float)
    values = {"topk": -2 * weights, "bh": -2.1 * weights + rng.normal(0, 5, size=40)}
    outcomes = [
        outcome(config, i, {"byte_perplexity": [float(value), float(weights[i])]})
        for config, column in values.items()
        for i, value in enumerate(column)
    ]
    found = only(compare_tasks(outcomes, "topk"))
    assert found.kind == "mean"
    assert found.difference == pytest.approx(
        (values["bh"].sum() - values["topk"].sum()) / weights.sum()
    )
    assert found.low < found.difference < found.high < 0
    assert found.gained is None
    assert found.reference_value == pytest.approx(-2.0)


def test_holm_corrects_across_configurations() -> None:
    rules = {"bh": RULE, "strict": [1] * 25 + [0] * 35, "same": REFERENCE}
    outcomes = answers("topk", REFERENCE)
    for name, right in rules.items():
        outcomes += answers(name, right)
    by_name = {c.config_name: c for c in compare_tasks(outcomes, "topk")}
    assert by_name["strict"].p_corrected == pytest.approx(2 * by_name["strict"].p)
    assert by_name["bh"].p_corrected == pytest.approx(by_name["bh"].p)
    assert math.isnan(by_name["same"].p_corrected)
    assert "nothing to test" in by_name["same"].note


def test_different_items_are_refused() -> None:
    outcomes = [
        outcome("topk", 0, {"acc": 1.0}),
        outcome("bh", 0, {"acc": 1.0}, item_hash="another item"),
    ]
    with pytest.raises(InputError, match="'quiz' was answered on different items"):
        compare_tasks(outcomes, "topk")


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(InputError, match="reference 'topk_8'; there are: bh"):
        compare_tasks(answers("bh", RULE), "topk_8")
