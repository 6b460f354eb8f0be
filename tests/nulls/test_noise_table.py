"""The published all-noise table is what the command measured, and the command can be repeated."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from benchmarks.noise_table import ALPHAS, BLOCK, HERE, METHOD, NUM_EXPERTS, render
from bh_routing.nulls import NULLS, noise_control

RESULTS = json.loads((HERE / "noise_table.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [METHOD, HERE / "noise_table.md"], ids=lambda page: page.name)
def test_the_page_shows_the_measured_table(page: Path) -> None:
    assert render(RESULTS) in page.read_text(encoding="utf-8")


def test_the_page_holds_one_block_for_the_command_to_write_into() -> None:
    assert len(BLOCK.findall(METHOD.read_text(encoding="utf-8"))) == 1


def test_the_table_covers_every_null_at_every_alpha() -> None:
    rows = [(row["null"], row["alpha"]) for row in RESULTS["noise"]]
    assert rows == [(null, alpha) for null in NULLS for alpha in ALPHAS]


@pytest.mark.parametrize("null", NULLS)
def test_measuring_again_gives_the_published_shares(null: str) -> None:
    made = RESULTS["made"]
    again = noise_control(
        null,
        alphas=ALPHAS,
        num_experts=NUM_EXPERTS,
        model_top_k=made["model_top_k"],
        tokens=made["tokens"],
        seed=made["seeds"][0],
    )
    published = [row for row in RESULTS["noise"] if row["null"] == null]
    for result, row in zip(again, published, strict=True):
        # Not to the bit: another torch may draw other noise.
        assert result.share_any == pytest.approx(row["share_any"], abs=0.015)
        assert result.mean_experts == pytest.approx(row["mean_experts"], abs=0.15)


def test_an_error_rate_is_nearer_to_alpha_on_noise_than_a_knob() -> None:
    excess = {
        (row["alpha_is"], row["null"]): row["share_any"] / row["alpha"]
        for row in RESULTS["noise"]
        if row["alpha"] == 0.05
    }
    assert excess["error rate", "gaussian"] < 3 < 15 < excess["knob", "background"]


def test_the_examples_of_the_page_run() -> None:
    outcome = doctest.testfile(str(METHOD), module_relative=False)
    assert outcome.attempted >= 6
    assert outcome.failed == 0
