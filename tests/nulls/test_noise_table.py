"""The published all-noise table is what the command measured, and the command can be repeated."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import get_args

import pytest

from benchmarks.noise_table import (
    ALPHAS,
    BLOCK,
    DROP_ALPHAS,
    DROP_BLOCK,
    HERE,
    METHOD,
    NUM_EXPERTS,
    Mattered,
    measure_drop_noise,
    render,
    render_drop,
)
from bh_routing.nulls import NULLS
from bh_routing.rules import BenjaminiHochberg, noise_control

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
        [BenjaminiHochberg(alpha, null=null) for alpha in ALPHAS],
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
    assert excess["error rate", "gaussian"] < 3 < 15 < excess["tuning parameter", "background"]


def test_the_examples_of_the_page_run() -> None:
    outcome = doctest.testfile(str(METHOD), module_relative=False)
    assert outcome.attempted >= 6
    assert outcome.failed == 0


DROP = {(row["mattered"], row["alpha"]): row for row in RESULTS["drop_noise"]}


def test_the_page_shows_what_bh_drop_does_on_noise() -> None:
    for page in (METHOD, HERE / "noise_table.md"):
        assert render_drop(RESULTS) in page.read_text(encoding="utf-8")
    assert len(DROP_BLOCK.findall(METHOD.read_text(encoding="utf-8"))) == 1
    assert list(DROP) == [(way, alpha) for way in get_args(Mattered) for alpha in DROP_ALPHAS]


def test_where_slots_matter_by_chance_alpha_bounds_the_tokens_with_any_drop() -> None:
    for (mattered, alpha), row in DROP.items():
        assert row["false_low"] <= alpha / 2
        if mattered == "by chance":
            assert row["dropped"]["low"] <= alpha
        else:
            assert row["dropped"]["low"] > alpha


def test_measuring_the_drops_again_gives_the_published_numbers() -> None:
    again = measure_drop_noise(RESULTS["made"]["tokens"])
    for new, row in zip(again, RESULTS["drop_noise"], strict=True):
        # Not to the bit: another torch may draw other noise.
        assert new["mean_kept"] == pytest.approx(row["mean_kept"], abs=0.1)
        assert new["false_share"] == pytest.approx(row["false_share"], abs=0.01)
        assert new["dropped"]["share"] == pytest.approx(row["dropped"]["share"], abs=0.02)
