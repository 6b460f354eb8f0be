"""`bh-routing bench` on the demo model."""

from __future__ import annotations

import json

import pytest

from bh_routing.cli.main import EXIT_BAD_INPUT, EXIT_DONE, main


@pytest.mark.full
def test_decode_is_timed_beside_generate(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "decode", "--device", "cpu", "--tokens", "3", "--rounds", "1", "--json"]
    assert main(arguments) == EXIT_DONE
    document = json.loads(capsys.readouterr().out)
    assert document["model"] == "demo"
    assert document["copied_bytes_per_second"] > 0
    rows = {row["contender"]: row for row in document["rows"]}
    assert rows.keys() == {"engine, top-k 8", "engine, top-k 4", "engine, bh 4", "generate"}
    assert rows["engine, top-k 4"]["bytes"] < rows["engine, top-k 8"]["bytes"]
    assert all(row["tokens_per_second"] > 0 for row in rows.values())


@pytest.mark.full
@pytest.mark.parametrize("part", ["prefill", "suite"])
def test_every_part_prints_a_table(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", part, "--device", "cpu", "--rounds", "1"]) == EXIT_DONE
    assert "copied_bytes_per_second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("decoding", "part must be one of decode, prefill, suite; got 'decoding'"),
        ("decode --batches one", "numbers like 1,4,16, got 'one'"),
        ("decode --batches 0", "at least 1"),
        ("decode --tokens 1", "tokens must be at least 2"),
    ],
)
def test_a_wrong_argument_is_refused_before_a_model_is_loaded(
    arguments: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments.split()]) == EXIT_BAD_INPUT
    assert part in capsys.readouterr().err
