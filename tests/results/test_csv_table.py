"""What the one CSV writer writes reads back the same, and starts nothing anywhere."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bh_routing.analysis.results import read_experiments
from bh_routing.analysis.speed import read_timings
from bh_routing.errors import ResultsError
from bh_routing.experiments.folder import render_header, render_row
from bh_routing.results.files import read_csv, render_csv
from bh_routing.results.records import TIMING_COLUMNS
from tests.experiments.conftest import make_record

TEXTS = [
    '=HYPERLINK("http://x","y")',
    "@SUM(1)",
    "-2+3",
    "+1",
    " \t=1+1",
    "＝1",
    "'=quoted by somebody",
    "''-twice",
    "'tis no formula",
    "a\x1b[31mred",
    "literal \\x1b and \\\\x1b",
    "\\\x1b",
    "=\x9b31m",
    "back\\slash",
    "one\rtwo",
    "one\r\ntwo\n",
    "\r",
    'a, "b"; c',
    "",
    "\ufeff=1",
    "nul\x00",
    "nan",
    "línea 中 🙂",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_reads_back_as_it_was(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(render_csv([{"text": text, "x": 0.1 + 0.2}, {"text": "end", "x": math.nan}]))
    rows = read_csv(path, ["text", "x"])
    assert [row["text"] for row in rows] == [text, "end"]
    assert float(rows[0]["x"]) == 0.1 + 0.2


@pytest.mark.parametrize("missing", [None, math.nan, np.float64("nan"), -math.nan])
def test_a_missing_number_is_an_empty_cell(missing: float | None) -> None:
    assert render_csv([{"a": 1, "x": missing, "b": "nan"}]) == b"a,x,b\n1,,nan\n"


@pytest.mark.parametrize("text", TEXTS)
def test_no_cell_is_a_formula_and_no_byte_moves_a_terminal(text: str) -> None:
    content = render_csv([{"text": text}]).decode()
    assert not any((ord(c) < 32 and c not in "\r\n\t") or 127 <= ord(c) < 160 for c in content)
    _, (cell,) = csv.reader(content.splitlines(keepends=True))
    assert not cell.lstrip(" \t\r\n\ufeff").startswith(("=", "+", "-", "@", "＝"))


def test_ordinary_texts_and_numbers_are_what_pandas_reads(tmp_path: Path) -> None:
    rows = [{"a": "one\rtwo", "b": -0.5}, {"a": "back\\slash, 'quoted'", "b": 3.0}]
    (tmp_path / "table.csv").write_bytes(render_csv(rows))
    assert pd.read_csv(tmp_path / "table.csv").to_dict(orient="records") == rows


@pytest.mark.parametrize("text", [t for t in TEXTS if t])
def test_both_tables_of_a_run_hold_any_prompt(text: str, tmp_path: Path) -> None:
    record = make_record(prompt_text=text, generated_text=text, min_experts=0.1 + 0.2)
    table = tmp_path / "table.csv"
    table.write_bytes((render_header() + render_row(record)).encode())
    (row,) = read_experiments(table).to_dict(orient="records")
    assert (row["prompt_text"], row["generated_text"]) == (text, text)
    assert row["min_experts"] == record.min_experts
    assert math.isnan(row["max_experts"])
    timing = dict.fromkeys(TIMING_COLUMNS, 1.0) | {"config_name": "a", "prompt_text": text}
    table.write_bytes(render_csv([timing, timing]))
    assert read_timings(table)["prompt_text"].tolist() == [text, text]


def test_a_number_that_a_failed_experiment_lacks_is_an_empty_cell(tmp_path: Path) -> None:
    failed = make_record(status="failed", error="out of memory", avg_experts_per_token=math.nan)
    row = render_row(failed)
    assert "nan" not in row and ",,,," in row
    table = tmp_path / "table.csv"
    older = row.replace(",,", ",nan,").replace(",,", ",nan,")  # as older versions wrote it
    table.write_text(render_header() + row + older)
    numbers = read_experiments(table)[["avg_experts_per_token", "max_experts", "tokens_per_sec"]]
    assert numbers.shape == (2, 3) and numbers.isna().all(axis=None)


@pytest.mark.parametrize("value", [None, math.nan, np.float64("nan")])
def test_an_unknown_value_is_an_empty_cell_in_every_table(value: float | None) -> None:
    assert render_csv([{"a": value, "b": 1, "c": "nan"}]) == b"a,b,c\n,1,nan\n"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "it is empty"),
        (b"a,b\n1,2", "no line end"),
        (b'a,b\n1,"2\n', "unexpected end of data"),
        (b"a,b\n1\n", "row 1 has 1 of 2 cells"),
        (b"a,c\n1,2\n", "lacks the columns b"),
        (b"a,b\n\xff,2\n", "can't decode"),
    ],
)
def test_a_file_that_is_not_whole_is_an_error(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=match):
        read_csv(path, ["a", "b"])
