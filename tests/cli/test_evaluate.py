"""`evaluate` through the command line, on the demo model."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from bh_routing.cli import main
from bh_routing.demo import demo_folder
from bh_routing.nulls.calibration import Calibration
from tests.experiments.conftest import read_folder

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


def test_files_that_share_a_name_are_all_scored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["evaluate", "--model", "demo", "--device", "cpu", "--rule", "top_k:k=4", "--json"]
    for folder in "abc":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(f"Day {folder} at sea. " * ord(folder))
        command += ["--text", str(tmp_path / folder / "text.txt")]
    command += ["--text", str(tmp_path / "a" / "text.txt")]  # once more, and counted once
    assert main(command) == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)["rules"]
    assert (row["documents"], row["clusters"]) == (3, 3)
    assert "1 of 4 documents repeat the text of another; each text counts once" in captured.err


def test_a_folder_takes_rules_of_any_calibration_and_names_what_it_must_not_mix(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, demo_calibration: Calibration
) -> None:
    folder = tmp_path / "out"
    path = str(demo_calibration.save(tmp_path / "mine.safetensors"))
    command = ["evaluate", "--model", "demo", "--device", "cpu", "--tokens", "50", "--json"]
    command += ["--output", str(folder), "--rule", "top_k:k=4"]
    assert main(command) == 0
    (first,) = json.loads(capsys.readouterr().out)["rules"]
    assert main([*command, "--rule", "bh:alpha=0.05", "--calibration", path]) == 0
    both = json.loads(capsys.readouterr().out)["rules"]
    assert both[0]["nll"] == first["nll"]
    before = read_folder(folder)
    assert main([*command, "--window", "64"]) == 2
    assert "window: 1024 there, 64 now" in capsys.readouterr().err
    other = shutil.copytree(demo_folder(), tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"norm_topk_prob": True}
    (other / "config.json").write_text(json.dumps(config))
    assert main([*command, "--model", str(other)]) == 2
    assert "norm_topk_prob: False there, True now" in capsys.readouterr().err
    assert read_folder(folder) == before


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
