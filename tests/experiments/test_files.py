from __future__ import annotations

import csv
import json
import math
import stat
from pathlib import Path

import numpy as np
import pytest

from bh_routing.experiments.files import (
    render_header,
    render_json,
    render_row,
    write_atomically,
)
from tests.experiments.conftest import make_record


def test_a_row_read_back_is_the_row_written(tmp_path: Path) -> None:
    record = make_record(prompt_text='x, "y"\r z\n', generated_text="\r", min_experts=0.1 + 0.2)
    path = tmp_path / "table.csv"
    write_atomically(path, (render_header() + render_row(record)).encode())
    with path.open(newline="", encoding="utf-8") as file:
        header, row = csv.reader(file)
    values = dict(zip(header, row, strict=True))
    assert values["prompt_text"] == record.prompt_text
    assert values["generated_text"] == "\r"
    assert float(values["min_experts"]) == record.min_experts
    assert math.isnan(float(values["max_experts"]))


def test_a_failed_write_leaves_the_old_file_and_no_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.csv"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_bytes() == b"old"


def test_a_written_file_has_the_mode_that_any_new_file_has(tmp_path: Path) -> None:
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.touch()
    write_atomically(ours, b"")
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_json_holds_no_nan_and_no_numpy() -> None:
    text = render_json({"a": [math.nan, np.int64(3), (math.inf, np.float32(0.5))], 1: None})
    assert json.loads(text) == {"a": [None, 3, [None, 0.5]], "1": None}
