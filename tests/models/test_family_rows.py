"""The table of families says what was found, and its page says the same."""

from __future__ import annotations

import json

import pytest

from bh_routing.cli.main import main
from bh_routing.models.families import family_rows
from tests.families.zoo import family_names
from tools import write_families

ROWS = {row["family"]: row for row in family_rows()}


def test_the_page_is_up_to_date() -> None:
    assert write_families.main(["--check"]) == 0, "run: python -m tools.write_families"


@pytest.mark.parametrize(
    "family",
    [
        name
        if name in ("olmoe", "deepseek_v3", "llama4")
        else pytest.param(name, marks=pytest.mark.full)
        for name in family_names()
    ],
)
def test_a_row_is_what_the_probe_finds(family: str) -> None:
    found = write_families.try_family(family)
    assert {**ROWS[family], "versions": []} == found


def test_enough_families_are_supported() -> None:
    assert sum(row["supported"] for row in ROWS.values()) >= 66


def test_the_command_lists_the_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == list(ROWS.values())
    assert main(["models"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS) + 1


def test_the_command_checks_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--check", "demo", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["router"] for row in rows] == [f"model.layers.{i}.mlp.gate" for i in range(6)]
    assert {(row["experts"], row["top_k"], row["how"]) for row in rows} == {
        (64, 8, "softmax; raw weights")
    }


def test_a_model_that_cant_be_checked_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--check", "./nowhere"]) == 2
    assert "doesn't exist" in capsys.readouterr().err
