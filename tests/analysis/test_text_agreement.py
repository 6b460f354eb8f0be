"""When generated texts part from the baseline's."""

from __future__ import annotations

import math

import pytest

from bh_routing.analysis.speed import text_agreement
from bh_routing.results.records import ExperimentDetail


def _details(**texts: dict[str, list[int]]) -> dict[tuple[str, str], ExperimentDetail]:
    return {
        (name, prompt): ExperimentDetail(output_token_ids=ids)
        for name, own in texts.items()
        for prompt, ids in own.items()
    }


BASE = {"a": [1, 2, 3, 4], "b": [5, 6], "c": [7, 8, 9]}


def test_prefix_and_positions_are_shares_of_the_longer_text() -> None:
    other = {"a": [1, 2, 9, 4], "b": [5, 6, 7, 8], "c": [7, 8, 9]}
    ours = text_agreement(_details(base=BASE, bh=other), "base")["bh"]
    assert ours.prefix_share.mean == pytest.approx((2 / 4 + 2 / 4 + 1) / 3)
    assert ours.agreement_share.mean == pytest.approx((3 / 4 + 2 / 4 + 1) / 3)
    assert (ours.prompts, ours.identical, ours.prefix_tokens_median) == (3, 1, 2.0)


def test_a_configuration_that_writes_the_same_agrees_wholly() -> None:
    ours = text_agreement(_details(base=BASE, same=dict(BASE)), "base")["same"]
    assert (ours.prefix_share.mean, ours.agreement_share.mean, ours.identical) == (1.0, 1.0, 3)


def test_a_failed_experiment_is_left_out_and_not_a_disagreement() -> None:
    ours = text_agreement(_details(base=BASE, bh={"a": [1, 2, 3, 4], "b": []}), "base")["bh"]
    assert (ours.prompts, ours.left_out, ours.prefix_share.mean) == (1, 2, 1.0)


def test_the_baseline_is_not_compared_with_itself() -> None:
    assert list(text_agreement(_details(base=BASE, bh=BASE), "base")) == ["bh"]


def test_without_shared_prompts_the_shares_are_nan() -> None:
    ours = text_agreement(_details(bh=BASE), "base")["bh"]
    assert ours.prompts == 0
    assert math.isnan(ours.prefix_share.mean)


def test_an_interval_of_a_share_stays_between_0_and_1() -> None:
    other = {"a": [9], "b": [9], "c": [7, 8, 9]}
    ours = text_agreement(_details(base=BASE, bh=other), "base")["bh"]
    assert (ours.prefix_share.low, ours.prefix_share.high) == (0.0, 1.0)
