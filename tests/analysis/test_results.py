"""What load_results reads back, and what it refuses."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from bh_routing.analysis.comparisons import choose_baseline
from bh_routing.analysis.results import load_results
from bh_routing.errors import ResultsError
from bh_routing.experiments.folder import render_header, render_row
from bh_routing.results.records import (
    CSV_COLUMNS,
    JOURNAL,
    REPORT_HTML,
    RESULTS_CSV,
    RUN_JSON,
    SCHEMA_VERSION,
    SUMMARY_JSON,
    ExperimentDetail,
    ExperimentRecord,
)

NASTY = 'NA, "quoted"\r\nnull\u2028é\x0b\\n;=1+1'


def record(name: str = "topk_8", prompt: str = "NA", **more: object) -> ExperimentRecord:
    return ExperimentRecord(
        config_name=name,
        prompt_text=prompt,
        prompt_category="simple",
        prompt_description="nan",
        generated_text=NASTY,
        num_output_tokens=7,
        avg_experts_per_token=0.1 + 0.2,
        **more,  # type: ignore[arg-type]
    )


def journal_line(row: ExperimentRecord, version: int = SCHEMA_VERSION) -> str:
    entry = {
        "schema_version": version,
        "key": f"{row.config_name}/{row.prompt_text}",
        "record": asdict(row),
        "detail": asdict(ExperimentDetail(output_token_ids=[3, 1], experts_by_layer=[8.0])),
    }
    return json.dumps(entry) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        record(),
        record("bh_strict"),
        record("bh_strict", "second", status="failed", error="out, of memory"),
    ]
    text = render_header() + "".join(render_row(row) for row in rows)
    (tmp_path / RESULTS_CSV).write_text(text, encoding="utf-8", newline="")
    lines = "".join(journal_line(row) for row in [*rows, record("taken_out_since")])
    (tmp_path / JOURNAL).write_text(lines, encoding="utf-8", newline="")
    (tmp_path / RUN_JSON).write_text('{"schema_version": 1}', encoding="utf-8")
    return tmp_path


def test_texts_and_numbers_come_back_as_they_were_written(folder: Path) -> None:
    table = load_results(folder).experiments
    assert list(table["prompt_text"]) == ["NA", "NA", "second"]
    assert table["generated_text"][0] == NASTY
    assert table["prompt_description"][0] == "nan"
    assert table["avg_experts_per_token"][0] == 0.1 + 0.2
    assert math.isnan(table["min_experts"][0])
    assert table["num_output_tokens"].dtype == "int64"


def test_details_are_those_of_the_csvs_rows(folder: Path) -> None:
    details = load_results(folder).details
    assert set(details) == {("topk_8", "NA"), ("bh_strict", "NA"), ("bh_strict", "second")}
    assert details["topk_8", "NA"].output_token_ids == [3, 1]


def test_without_a_csv_the_journal_gives_the_same_table(folder: Path) -> None:
    from_csv = load_results(folder).experiments
    (folder / RESULTS_CSV).unlink()
    from_journal = load_results(folder).experiments.query("config_name != 'taken_out_since'")
    assert from_journal.equals(from_csv)


def test_the_last_of_two_journal_lines_of_an_experiment_counts(folder: Path) -> None:
    again = record().config_name
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(journal_line(record(again)).replace("[3, 1]", "[9]"))
    assert load_results(folder).details["topk_8", "NA"].output_token_ids == [9]


def test_a_journal_line_being_written_is_skipped_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(journal_line(record("bh_loose"))[:40])
    with caplog.at_level(logging.WARNING):
        assert len(load_results(folder).details) == 3
    assert "being written" in caplog.text


def _cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def test_a_csv_cut_anywhere_inside_a_row_is_refused(folder: Path) -> None:
    path = folder / RESULTS_CSV
    whole = path.read_bytes()
    last_row = whole.rindex(b"bh_strict")
    for end in range(last_row + 1, len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ResultsError, match="can't be read whole"):
            load_results(folder)


@pytest.mark.parametrize("error", ["out of memory", '"out, of memory'])
def test_a_csv_cut_inside_its_last_text_is_refused(folder: Path, error: str) -> None:
    path = folder / RESULTS_CSV
    path.write_text(render_header() + "a," * (len(CSV_COLUMNS) - 2) + f"failed,{error}")
    with pytest.raises(ResultsError, match="can't be read whole"):
        load_results(folder)


def test_a_broken_line_in_the_middle_of_the_journal_is_refused(folder: Path) -> None:
    path = folder / JOURNAL
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(lines[0][:50] + "\n" + "".join(lines[1:]), encoding="utf-8")
    with pytest.raises(ResultsError, match="line 1 isn't a record"):
        load_results(folder)


@pytest.mark.parametrize("name", [RUN_JSON, SUMMARY_JSON])
@pytest.mark.parametrize("text", ['{"a": 1', "[1, 2]"])
def test_a_json_file_that_is_not_a_whole_object_is_refused(
    folder: Path, name: str, text: str
) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError, match=name):
        load_results(folder)


def test_another_schema_version_is_refused_by_number(folder: Path) -> None:
    (folder / JOURNAL).write_text(journal_line(record(), version=99), encoding="utf-8")
    with pytest.raises(ResultsError, match="schema version 99"):
        load_results(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "lacks the columns config_name"),
        ("", "empty"),
        ("\x00\n", "lacks the columns"),
    ],
)
def test_a_foreign_csv_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / RESULTS_CSV).write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError, match=message):
        load_results(folder)


def test_a_number_column_with_text_is_refused(folder: Path) -> None:
    path = folder / RESULTS_CSV
    path.write_text(
        path.read_text(
            encoding="utf-8",
        ).replace("0.30000000000000004", "lots")
    )
    with pytest.raises(ResultsError, match="avg_experts_per_token holds text"):
        load_results(folder)


def test_a_missing_or_foreign_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="nowhere; name a folder that a run wrote"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match="holds neither"):
        load_results(tmp_path)


def test_a_notebook_shows_means_of_finished_experiments_as_text(tmp_path: Path) -> None:
    rows = [record("<b>x</b>"), record("<b>x</b>", "second", status="failed")]
    text = render_header() + "".join(render_row(row) for row in rows)
    (tmp_path / RESULTS_CSV).write_text(text, encoding="utf-8", newline="")
    shown = load_results(tmp_path)._repr_html_()
    assert "&lt;b&gt;x&lt;/b&gt;" in shown
    assert "<td>1</td>" in shown
    assert "<td>0.3</td>" in shown


def test_show_opens_the_page_or_says_how_to_make_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with pytest.raises(ResultsError, match=r"run: bh_routing\.report\.page\.write_page\('"):
        load_results(folder).show()
    (folder / REPORT_HTML).write_text("page")
    assert load_results(folder).show() == (folder / REPORT_HTML).resolve()
    assert opened == [(folder / REPORT_HTML).resolve().as_uri()]


def test_a_run_that_records_no_baseline_has_its_first_static_rule(folder: Path) -> None:
    rules = {"topk_like": {"method": "top_p", "p": 0.9}, "bh_strict": {"method": "top_k", "k": 8}}
    run = {"schema_version": 1, "spec": {"configs": rules}}
    (folder / RUN_JSON).write_text(json.dumps(run), encoding="utf-8")
    assert choose_baseline(load_results(folder).experiments) == "bh_strict"
