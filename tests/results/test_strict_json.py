"""JSON of ours is read by every parser, and names what isn't JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bh_routing.errors import ResultsError
from bh_routing.results.files import read_json_object, render_json, render_json_lines
from bh_routing.results.journal import Journal, as_object


def test_json_holds_no_nan_and_no_numpy() -> None:
    text = render_json({"a": [math.nan, np.int64(3), (math.inf, np.float32(0.5))], 1: None})
    assert json.loads(text) == {"a": [None, 3, [None, 0.5]], "1": None}
    assert json.loads(render_json({"b": np.array([1.0, -math.inf]), "c": np.float64("nan")})) == {
        "b": [1.0, None],
        "c": None,
    }


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d alone", "line\rend", "\x1b[0m", "\u2028"])
def test_any_text_is_valid_utf8_and_reads_back(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(render_json({"text": text}))
    assert read_json_object(path) == {"text": text}
    path.write_bytes(render_json_lines([{"text": text}, {"n": 1}]))
    path.read_text(encoding="utf-8")
    assert Journal.read(path, as_object).items == [{"text": text}, {"n": 1}]


def test_a_path_is_written_as_its_text() -> None:
    assert json.loads(render_json({"folder": Path("a/b")})) == {"folder": "a/b"}


def test_what_has_no_json_form_is_named() -> None:
    with pytest.raises(TypeError, match="no JSON form for object"):
        render_json({"a": [object()]})


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000, b""])
def test_no_json_object_is_an_error_that_ends_in_the_remedy(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=r"run\.json can't be read whole: .*; do that$"):
        read_json_object(path, remedy="do that")
