from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bh_routing.analysis.comparisons import analyze_results
from bh_routing.errors import InputError
from bh_routing.report.export import export_results
from bh_routing.results.files import render_json
from bh_routing.results.records import CSV_COLUMNS

openpyxl: Any = importlib.import_module("openpyxl")  # ships no type information
FillFolder = Callable[..., Path]
FORMULAS = ["=cmd|'/c calc'!A0", "+1+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "=HYPERLINK(1)"]


def sheet(path: Path, name: str) -> list[list[Any]]:
    book = openpyxl.load_workbook(path)
    return [[cell.value for cell in row] for row in book[name].iter_rows()]


def test_a_workbook_holds_every_experiment_and_the_means(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    path = export_results(fill_folder(results), "xlsx")
    assert path.name == "bh_routing_results.xlsx"
    rows = sheet(path, "experiments")
    assert rows[0] == list(CSV_COLUMNS)
    assert len(rows) == len(results) + 1
    column = CSV_COLUMNS.index("avg_experts_per_token")
    assert [row[column] for row in rows[1:]] == pytest.approx(list(results.iloc[:, column]))
    means = {row[0]: row for row in sheet(path, "configurations")[1:]}
    of_results = results.groupby("config_name")["avg_experts_per_token"].mean()
    assert means["bh_loose"][2] == pytest.approx(of_results["bh_loose"])
    compared = sheet(path, "comparisons")
    assert [compared[0][3], compared[0][8]] == ["mean_difference", "p"]
    summary = analyze_results(results)["comparisons"]["bh_strict"]["avg_experts_per_token"]
    assert compared[1][8] == pytest.approx(summary["p"])


def test_a_workbook_runs_nothing(results: pd.DataFrame, fill_folder: FillFolder) -> None:
    texts = (FORMULAS * len(results))[: len(results)]
    results["prompt_text"] = [
        text + prompt for text, prompt in zip(texts, results["prompt_text"], strict=True)
    ]
    results["generated_text"] = texts
    path = export_results(fill_folder(results), "xlsx")
    book = openpyxl.load_workbook(path)
    for page in book.worksheets:
        for row in page.iter_rows():
            for cell in row:
                assert cell.data_type != "f"
                if isinstance(cell.value, str):
                    assert not cell.value.startswith(("=", "+", "-", "@", "\t", "\r"))


def test_control_characters_are_left_out_of_a_workbook(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    results["generated_text"] = "a\x07b\x1b[31mc\u202ed\x00" + "x" * 40_000
    rows = sheet(export_results(fill_folder(results), "xlsx"), "experiments")
    text = rows[1][CSV_COLUMNS.index("generated_text")]
    assert text.startswith("ab[31mcd") and len(text) <= 32_767


def test_missing_numbers_are_empty_cells(results: pd.DataFrame, fill_folder: FillFolder) -> None:
    results["expert_utilization_max_min_ratio"] = np.nan
    rows = sheet(export_results(fill_folder(results), "xlsx"), "experiments")
    assert rows[1][CSV_COLUMNS.index("expert_utilization_max_min_ratio")] is None


def test_json_is_strict_and_whole(results: pd.DataFrame, fill_folder: FillFolder) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    results["generated_text"] = "a\x07b\nc"
    results["avg_experts_decode"] = np.nan
    path = export_results(fill_folder(results), "json")
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert len(content["experiments"]) == len(results)
    first = content["experiments"][0]
    assert first["generated_text"] == "ab\nc" and first["avg_experts_decode"] is None
    assert first["num_output_tokens"] == 50
    assert content["summary"]["baseline"] == "topk_8"
    assert content["run"]["model"]["name"] == "demo"
    assert set(content["columns"]) == set(CSV_COLUMNS)


def test_latex_is_a_booktabs_table_of_the_means(
    results: pd.DataFrame, quality: dict[str, Any], fill_folder: FillFolder
) -> None:
    folder = fill_folder(results)
    summary = analyze_results(results) | {"quality": quality}
    (folder / "analysis_summary.json").write_bytes(render_json(summary))
    text = export_results(folder, "latex").read_text(encoding="utf-8")
    assert text.index("\\toprule") < text.index("\\midrule") < text.index("\\bottomrule")
    line = next(line for line in text.splitlines() if "bh\\_strict" in line)
    mean = results.loc[results["config_name"] == "bh_strict", "avg_experts_per_token"]
    cells = [cell.strip() for cell in line.rstrip("\\ ").split("&")]
    assert cells[1] == f"{mean.mean():.2f} $\\pm$ {mean.std():.2f}"
    ratio = {r["config_name"]: r["perplexity_ratio"] for r in quality["rules"]}["bh_strict"]
    assert cells[-1] == f"${100 * (ratio - 1):+.1f}$"
    widths = {line.count("&") for line in text.splitlines() if line.endswith("\\\\")}
    assert widths == {6}


def test_latex_escapes_names(
    results: pd.DataFrame, fill_folder: FillFolder, run_document: dict[str, Any]
) -> None:
    results["config_name"] = results["config_name"].replace("bh_loose", "50%_&_$x$\\input{a}")
    run_document["model"]["name"] = "\\input{/etc/passwd}"
    text = export_results(fill_folder(results, run_document), "latex").read_text(encoding="utf-8")
    assert "\\input" not in text
    assert not re.search(r"(?<!\\)&_", text)


@pytest.mark.parametrize(
    ("to", "output", "sentence"),
    [
        ("xls", None, "unknown format 'xls'; known: xlsx, latex, json; did you mean 'xlsx'"),
        ("json", "results.csv", r"must end in \.json, got results\.csv"),
        ("json", "run.json", r"run\.json belongs to the run"),
        ("json", "folder.json", "must be a file, got the folder"),
    ],
)
def test_bad_wishes_are_refused_in_a_sentence(
    results: pd.DataFrame, fill_folder: FillFolder, to: str, output: str | None, sentence: str
) -> None:
    folder = fill_folder(results)
    (folder / "folder.json").mkdir()
    before = (folder / "run.json").read_bytes()
    with pytest.raises(InputError, match=sentence):
        export_results(folder, to, folder / output if output else None)
    assert (folder / "run.json").read_bytes() == before


def test_the_csv_stays_as_it_was(results: pd.DataFrame, fill_folder: FillFolder) -> None:
    folder = fill_folder(results)
    before = (folder / "bh_routing_results.csv").read_bytes()
    for to in ("xlsx", "latex", "json"):
        assert export_results(folder, to, folder / "out" / f"x.{_ending(to)}").is_file()
    assert (folder / "bh_routing_results.csv").read_bytes() == before


def _ending(to: str) -> str:
    return "tex" if to == "latex" else to


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds neither"):
        export_results(tmp_path, "json")


def test_an_export_without_a_finished_experiment_is_still_whole(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    results["status"] = "failed"
    folder = fill_folder(results)
    assert len(sheet(export_results(folder, "xlsx"), "experiments")) == 61
    assert "\\bottomrule" in export_results(folder, "latex").read_text(encoding="utf-8")
    content = json.loads(export_results(folder, "json").read_text(encoding="utf-8"))
    assert math.isclose(len(content["experiments"]), 60)
