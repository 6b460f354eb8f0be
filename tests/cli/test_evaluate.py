"""`evaluate` through the command line, on the demo model."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from bh_routing.cli import main

FIELDS = (
    "config_name", "mean_experts", "tokens", "documents", "nll", "delta_nll", "delta_nll_low",
    "delta_nll_high", "perplexity_ratio", "kl_mean", "kl_p99", "same_top1_share",
)  # fmt: skip


def test_json_holds_a_record_a_rule(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["evaluate", "--model", "demo", "--device", "cpu", "--tokens", "300", "--json"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    names = [row["config_name"] for row in printed["rules"]]
    assert names == ["topk_8", "bh_strict", "bh_moderate", "bh_loose", "bh_adaptive"]
    assert all(set(FIELDS) <= row.keys() for row in printed["rules"])
    own, strict, moderate, loose, _ = printed["rules"]
    assert (own["mean_experts"], own["delta_nll"], own["kl_mean"]) == (8.0, 0.0, 0.0)
    assert strict["mean_experts"] < moderate["mean_experts"] < loose["mean_experts"] < 8
    assert strict["delta_nll"] > loose["delta_nll"] > 0
    assert strict["perplexity_ratio"] == pytest.approx(math.exp(strict["delta_nll"]))
    assert json.loads((tmp_path / "quality.json").read_text()) == printed
    with (tmp_path / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["nll"]) for row in rows] == [row["nll"] for row in printed["rules"]]


def test_a_rule_in_one_word_is_scored_alone_and_shown_as_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "texts.jsonl"
    lines = [{"text": f"Document {i} speaks of rivers and of stones.", "name": f"n{i}"} for i in
             range(25)]  # fmt: skip
    text.write_text("\n".join(json.dumps(line) for line in lines))
    command = ["evaluate", "--model", "demo", "--device", "cpu", "--text", str(text)]
    assert main([*command, "--rule", "top_k:k=3"]) == 0
    out = capsys.readouterr().out
    assert "top_k_k-3" in out
    assert "25 documents" in out
    assert "bh_" not in out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--rule", "bh:alpha=2"], "alpha"),
        (["--rule", "bhh:alpha=0.1"], "did you mean"),
        (["--rule", "bh:alpha"], "field=value"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "hf:only-a-name"], "hf:NAME:SPLIT"),
        (["--configs", "bh_strikt"], "bh_strict"),
        (["--rule", "top_k:k=4", "--window", "5000"], "1024"),
        (["--rule", "top_k:k=4", "--margin", "-1"], "--margin"),
    ],
)
def test_bad_input_ends_with_2_and_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], match: str
) -> None:
    output = tmp_path / "out"
    command = ["evaluate", "--model", "demo", "--device", "cpu", "--tokens", "50"]
    assert main([*command, "--output", str(output), *arguments]) == 2
    captured = capsys.readouterr()
    assert match in captured.err
    assert captured.err.strip().count("\n") == 0 or "calibrated" in captured.err
    assert not output.exists()
