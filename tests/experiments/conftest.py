"""A tiny run on the demo model, and records made by hand for the store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.models.load import LoadedModel
from bh_routing.results.records import ExperimentDetail, ExperimentRecord

# The null "gaussian" needs no calibration, which would take longer than these runs.
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "topk_8": {"method": "topk", "k": 8},
    "bh": {"method": "bh", "alpha": 0.2, "null": "gaussian"},
}
TINY_PROMPTS = [
    {"text": "Once upon a time", "category": "simple", "description": "a tale"},
    {"text": 'The river, wide and\nslow, "was"', "category": "medium", "description": "quotes"},
    {"text": "Water boils at", "category": "simple", "description": "physics"},
]

MakeTinySpec = Callable[..., RunSpec]


def run_driver(name: str, *arguments: object) -> dict[str, Any]:
    """Run a module of this folder, which forks, in a process of its own; return its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.experiments.{name}", *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def tiny_spec(tmp_path: Path) -> MakeTinySpec:
    """Build the spec of a tiny run into `results` of the test's folder; keywords change it."""

    def build(**changes: Any) -> RunSpec:
        values: dict[str, Any] = {
            "model": "demo",
            "output": tmp_path / "results",
            "max_tokens": 4,
            "device": "cpu",
            "configs": TINY_CONFIGS,
            "prompts": TINY_PROMPTS,
            "no_eval": True,
            "timing_rounds": 0,
        }
        return make_spec(RunSpec, **values | changes)

    return build


@pytest.fixture
def loaded_demo(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """Let `run` use the demo model that the session has loaded already."""

    def load(name: str, *, device: str, dtype: str, device_map: str | None) -> LoadedModel:
        assert (name, device, dtype, device_map) == ("demo", "cpu", "auto", None)
        return demo

    monkeypatch.setattr("bh_routing.experiments.preparation.load_model", load)
    return demo


def make_record(name: str = "bh", text: str = "a", **changes: Any) -> ExperimentRecord:
    """Return a row with a few values set."""
    values: dict[str, Any] = {
        "config_name": name,
        "prompt_text": text,
        "prompt_category": "simple",
        "prompt_description": "",
        "generated_text": 'b, "c"\r\nd',
        "avg_experts_per_token": 1 / 3,
    }
    return ExperimentRecord(**values | changes)


def make_detail() -> ExperimentDetail:
    """Return a detail with one layer of two experts."""
    return ExperimentDetail(output_token_ids=[1, 2], expert_load=[[1, 2]])


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
