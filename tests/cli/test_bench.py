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


def test_prefill_is_timed_by_length(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "prefill", "--device", "cpu", "--lengths", "3,40", "--rounds", "1"]
    assert main([*arguments, "--json"]) == EXIT_DONE
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["tokens"] for row in rows] == [3, 3, 3, 40, 40, 40]
    assert {row["contender"] for row in rows} == {"engine, top-k 8", "engine, bh 4", "transformers"}
    by_name = {(row["tokens"], row["contender"]): row for row in rows}
    top_k, bh = (by_name[40, f"engine, {name}"] for name in ("top-k 8", "bh 4"))
    assert (top_k["mean_experts"], bh["mean_experts"]) == (8, pytest.approx(4, abs=0.3))
    assert bh["distinct_experts"] < top_k["distinct_experts"] <= 64
    assert bh["bytes"] < top_k["bytes"]
    assert by_name[3, "engine, top-k 8"]["distinct_experts"] <= 24
    for row in rows:
        assert row["share_of_roof"] == pytest.approx(row["roof_ms"] / row["pass_ms"]["median"])


@pytest.mark.full
def test_the_suite_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "suite", "--device", "cpu", "--rounds", "1"]) == EXIT_DONE
    assert "copied_bytes_per_second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("decoding", "part must be one of decode, prefill, suite; got 'decoding'"),
        ("decode --batches one", "numbers like 1,4,16, got 'one'"),
        ("decode --batches 0", "batches must be numbers of at least 1, got (0,)"),
        ("prefill --lengths 16,long", "lengths must be numbers like 1,4,16, got '16,long'"),
        ("prefill --lengths 16,0", "lengths must be numbers of at least 1, got (16, 0)"),
        ("decode --tokens 1", "tokens must be at least 2"),
    ],
)
def test_a_wrong_argument_is_refused_before_a_model_is_loaded(
    arguments: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments.split()]) == EXIT_BAD_INPUT
    assert part in capsys.readouterr().err
