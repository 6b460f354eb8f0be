"""Three small lm-eval tasks that need no network: where they lie, and how lm-eval reads them.

`tools/make_lm_eval_tasks.py` makes the data from the demo's held-out evaluation text.
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets

TASKS = ("bh_cloze", "bh_choice", "bh_rolling")
CLOZE_FILE = "cloze.jsonl"
CHOICE_FILE = "choice.jsonl"
ROLLING_FILE = "rolling.jsonl"


def task_folder() -> Path:
    """Return the folder to give to lm-eval as its include path."""
    return Path(__file__).parent / "tasks"


def read_items(*, file: str, **_: object) -> dict[str, datasets.Dataset]:
    """Read one file of items; the tasks' YAML files name this function as their data set.

    lm-eval's own `data_files` are relative to the working folder, so an installed package can't
    name its files there. In memory: nothing is written to the data-set cache.

    Args:
        file: the name of a file in `task_folder()`.
        _: what lm-eval passes on to every data set: the task's metadata and the model's
            arguments.
    Returns:
        The items, as the split `test`.
    """
    lines = (task_folder() / file).read_text("utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
