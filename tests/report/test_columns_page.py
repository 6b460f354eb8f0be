from __future__ import annotations

import re
from pathlib import Path

import pytest

from bh_routing.results.records import CSV_COLUMNS, column_definitions
from tools import write_columns


def test_the_page_is_up_to_date() -> None:
    assert write_columns.main(["--check"]) == 0, "run: python tools/write_columns.py"


def test_the_page_lists_every_column_in_the_order_of_the_csv() -> None:
    listed = re.findall(r"^\| `(\w+)` \| ", write_columns.render(), re.MULTILINE)
    assert tuple(listed[: len(CSV_COLUMNS)]) == CSV_COLUMNS
    assert all(column_definitions().values())


def test_an_old_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "columns.md"
    page.write_text("old", encoding="utf-8")
    monkeypatch.setattr(write_columns, "TARGET", page)
    assert write_columns.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert write_columns.main([]) == 0
    assert write_columns.main(["--check"]) == 0
