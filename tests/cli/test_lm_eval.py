"""`lm-eval` through the command line, on the demo model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bh_routing.cli import main
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import TASK_OUTCOMES, TASK_SUMMARY

COMMAND = ["lm-eval", "--model", "demo", "--device", "cpu"]
OWN_TASK = """
task: rivers
custom_dataset: !function bh_routing.integrations.lm_eval.read_items
dataset_kwargs:
  file: cloze.jsonl
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: " river"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def calibrated(
    demo_calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    path = tmp_path_factory.mktemp("calibration") / "demo.safetensors"
    demo_calibration.save(path)
    return ["--calibration", str(path)]


def test_every_configuration_answers_the_same_items_and_is_compared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, calibrated: list[str]
) -> None:
    (tmp_path / "rivers.yaml").write_text(OWN_TASK)
    folder = tmp_path / "out"
    selected = ["--tasks", "bh_cloze,rivers", "--include-path", str(tmp_path), "--limit", "5"]
    configs = ["--configs", "topk_8,bh_moderate", *calibrated]
    assert main([*COMMAND, *selected, *configs, "--output", str(folder), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / TASK_SUMMARY).read_text("utf-8"))
    lines = [json.loads(line) for line in (folder / TASK_OUTCOMES).read_text("utf-8").splitlines()]
    answered = {
        (config, task): [
            (line["item"], line["item_hash"])
            for line in lines
            if (line["config_name"], line["task"]) == (config, task)
        ]
        for config in ("topk_8", "bh_moderate")
        for task in ("bh_cloze", "rivers")
    }
    assert all(len(found) == 5 for found in answered.values())
    assert answered["topk_8", "bh_cloze"] == answered["bh_moderate", "bh_cloze"]
    experts = {run["config_name"]: run["mean_experts"] for run in printed["runs"]}
    assert experts["topk_8"] == 8
    assert 1 < experts["bh_moderate"] < 8
    compared = {(c["config_name"], c["task"], c["metric"]) for c in printed["comparisons"]}
    assert compared == {
        ("bh_moderate", "bh_cloze", "acc"),
        ("bh_moderate", "bh_cloze", "perplexity"),
        ("bh_moderate", "rivers", "acc"),
    }
    assert printed["reference"] == "topk_8"

    assert main([*COMMAND, *selected, *configs, "--output", str(folder)]) == 2
    assert "already exists; choose another folder" in capsys.readouterr().err


def test_a_rule_of_decode_steps_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    selected = ["--tasks", "bh_cloze", "--limit", "2", "--configs", "topk_8"]
    assert main([*COMMAND, *selected, "--rule", "oea:k0=4"]) == 0
    assert "decides by decode step: in tasks scored by log-likelihood" in capsys.readouterr().err


def test_the_table_shows_experts_scores_and_flips(
    capsys: pytest.CaptureFixture[str], calibrated: list[str]
) -> None:
    selected = ["--tasks", "bh_cloze", "--limit", "3", "--configs", "topk_8,bh_strict"]
    assert main([*COMMAND, *selected, *calibrated]) == 0
    out = capsys.readouterr().out
    assert "bh_cloze acc, 3 items" in out
    assert "topk_8            8.00" in out
    assert "Differences from topk_8" in out


def test_a_rule_in_one_word_is_brought_to_a_budget(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    selected = ["--tasks", "bh_cloze", "--limit", "3", "--rule", "top_k:k=8", "--rule", "top_p"]
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"Day {day} at sea was calm." for day in range(40)))
    budget = ["--budget", "4", "--calibration-text", str(text)]
    assert main([*COMMAND, *selected, *budget, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["reference"] == "top_k_k-8"
    experts = {run["config_name"]: run["mean_experts"] for run in printed["runs"]}
    assert experts["top_k_k-8"] == 8
    assert 2 < experts["top_p@4"] < 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--configs", "bh_strict"], "is the model's own top-k (k = 8)"),
        (["--include-path", "/nowhere"], "task folder /nowhere doesn't exist"),
        (["--tasks", ","], "no task was given"),
        (["--configs", "topk_8", "--device-map", "auto"], "--device-map auto spreads"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("cloze.jsonl", "no_such.jsonl"),
        ("lm_eval.read_items", "lm_eval.read_nothing"),
        ("test_split: test", "test_split: exam"),
        ("custom_dataset", "custom_data_set"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_named_before_the_model_loads(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rivers.yaml").write_text(OWN_TASK.replace(old, new))
    arguments = ["--tasks", "rivers", "--include-path", str(tmp_path), "--configs", "topk_8"]
    assert main(["lm-eval", "--model", "./no-such-folder", *arguments]) == 2
    assert "task 'rivers' can't be loaded" in capsys.readouterr().err


@pytest.mark.full  # lm-eval indexes its own 14,000 tasks before one is known not to be there
def test_an_unknown_task_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--tasks", "bh_clothe", "--configs", "topk_8"]) == 2
    assert "did you mean 'bh_cloze'" in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(COMMAND) == 2
    expected = "needs lm_eval; run: pip install 'bh-routing[lm-eval]'"
    assert expected in capsys.readouterr().err
