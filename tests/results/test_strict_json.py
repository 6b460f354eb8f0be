"""JSON of ours is read by every parser, and names what isn't JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bh_routing.errors import ResultsError
from bh_routing.results.files import (
    read_json_lines,
    read_json_object,
    render_json,
    render_json_lines,
)
from bh_routing.results.records import SCHEMA_VERSION, line_checksum


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
    assert read_json_lines(path).objects == [{"text": text}, {"n": 1}]


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


def test_checksums_are_demanded_of_every_line_as_soon_as_the_first_has_one(
    tmp_path: Path,
) -> None:
    bodies = [{"schema_version": SCHEMA_VERSION, "n": n} for n in range(3)]
    previous, lines = "seed", []
    for body in bodies:
        previous = line_checksum(previous, body)
        lines.append({**body, "checksum": previous})
    path = tmp_path / "records.jsonl"
    path.write_bytes(render_json_lines(lines) + b'{"torn')
    found = read_json_lines(path, "seed")
    assert found.objects == bodies
    assert found.torn_bytes == 6
    for damaged in ([lines[0], lines[2]], [*lines[:2], bodies[2]], [{**lines[0], "n": 7}]):
        path.write_bytes(render_json_lines(damaged))
        with pytest.raises(ResultsError, match="doesn't fit its checksum"):
            read_json_lines(path, "seed")
