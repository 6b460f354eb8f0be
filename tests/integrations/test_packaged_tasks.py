"""The three local tasks: their data, and that lm-eval finds them wherever it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from bh_routing.engine.texts import packaged_documents
from bh_routing.experiments.defaults import LOCAL_TASKS
from bh_routing.integrations.lm_eval import (
    CHOICE_FILE,
    CLOZE_FILE,
    ROLLING_FILE,
    read_items,
    task_folder,
)
from tools.make_lm_eval_tasks import make_tasks


def items(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (task_folder() / file).read_text("utf-8").splitlines()]


def test_the_files_are_what_the_script_makes() -> None:
    made = make_tasks(packaged_documents("evaluation"))
    assert {file: items(file) for file in made} == made


def test_no_item_is_from_the_calibration_text() -> None:
    calibration = {document.cluster for document in packaged_documents("calibration")}
    for file in (CLOZE_FILE, CHOICE_FILE, ROLLING_FILE):
        assert not calibration & {item["cluster"] for item in items(file)}


def test_a_cloze_target_occurs_earlier_in_its_passage() -> None:
    cloze = items(CLOZE_FILE)
    assert len(cloze) == 200
    assert all(item["target"] in item["context"] for item in cloze)


def test_a_choice_has_four_different_continuations_and_no_favourite_place() -> None:
    choices = items(CHOICE_FILE)
    assert len(choices) == 200
    assert all(len(set(item["choices"])) == 4 for item in choices)
    answers = [item["answer"] for item in choices]
    assert all(35 <= answers.count(place) <= 65 for place in range(4))


def test_all_of_it_is_small() -> None:
    assert sum(path.stat().st_size for path in task_folder().iterdir()) <= 300_000


def test_lm_eval_loads_them_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    manager = TaskManager(include_path=str(task_folder()), include_defaults=False)
    loaded = manager.load(["bh_routing"])["tasks"]
    assert set(loaded) == set(LOCAL_TASKS)
    assert {name: len(task.test_docs()) for name, task in loaded.items()} == {
        "bh_cloze": 200,
        "bh_choice": 200,
        "bh_rolling": len(packaged_documents("evaluation")),
    }
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_the_model_do_not_disturb_the_data() -> None:
    assert len(read_items(file=CLOZE_FILE, pretrained="demo", version=1.0)["test"]) == 200
