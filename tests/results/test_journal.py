"""A journal finds every changed line, and reads those of older versions."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bh_routing.analysis.quality_row import read_quality
from bh_routing.analysis.results import load_results
from bh_routing.errors import ResultsError
from bh_routing.results.files import render_json_lines
from bh_routing.results.journal import Journal, as_object
from bh_routing.results.records import (
    CHECKPOINT,
    JOURNAL,
    QUALITY_JOURNAL,
    RESULTS_CSV,
    RUN_JSON,
    SCHEMA_VERSION,
    journal_seed,
    line_checksum,
)
from tests.analysis.scored import scored_documents
from tests.experiments.test_store import csv_prompts, fill, open_store


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
    found = Journal.read(path, as_object, seed="seed")
    assert found.items == bodies
    assert found.torn_bytes == 6
    for damaged in ([lines[0], lines[2]], [*lines[:2], bodies[2]], [{**lines[0], "n": 7}]):
        path.write_bytes(render_json_lines(damaged))
        with pytest.raises(ResultsError, match="doesn't fit its checksum"):
            Journal.read(path, as_object, seed="seed")


@pytest.mark.parametrize("order", [[0, 0, 1, 2], [0, 2], [1, 2], [0, 2, 1], [0, 1, 2, 1]])
def test_a_copied_removed_or_moved_line_is_found(tmp_path: Path, order: list[int]) -> None:
    """A checksum of each line alone would pass them all."""
    path = tmp_path / JOURNAL
    journal = Journal.resume(path, as_object, seed="seed", remedy="")
    journal.open()
    for n in range(3):
        journal.append({"n": n})
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(ResultsError, match="doesn't fit its checksum"):
        Journal.resume(path, as_object, seed="seed", remedy="")


def test_a_resumed_journal_continues_the_chain_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    for n in range(3):
        journal = Journal.resume(path, as_object, seed="seed", remedy="")
        assert [item["n"] for item in journal.items] == list(range(n))
        journal.open()
        journal.append({"n": n})
        journal.close()
        with path.open("ab") as file:
            file.write(b'{"n": ')
    assert len(Journal.read(path, as_object, seed="seed").items) == 3


def rename_as_before(folder: Path) -> None:
    """Give tokens per expert the name that older versions wrote, with fitting checksums."""
    chain = journal_seed(json.loads((folder / RUN_JSON).read_bytes())["identity"])
    lines = []
    for line in (folder / JOURNAL).read_bytes().splitlines():
        body = {k: v for k, v in json.loads(line).items() if k != "checksum"}
        body["detail"]["expert_counts"] = body["detail"].pop("expert_load")
        chain = line_checksum(chain, body)
        lines.append({**body, "checksum": chain})
    (folder / JOURNAL).write_bytes(render_json_lines(lines))
    (folder / CHECKPOINT).unlink()


def test_tokens_per_expert_are_read_under_their_older_name(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    rename_as_before(tmp_path)
    details = load_results(tmp_path).details.values()
    assert [detail.expert_load for detail in details] == [[[1, 2]]] * 2
    fill(tmp_path, range(2, 3))
    assert csv_prompts(tmp_path) == ["prompt 0", "prompt 1", "prompt 2"]
    assert [d.expert_load for d in load_results(tmp_path).details.values()] == [[[1, 2]]] * 3


def test_scores_are_read_under_the_older_name(tmp_path: Path) -> None:
    records = scored_documents("bh", documents=3)
    old = []
    for values in map(asdict, records):
        values["expert_counts"] = values.pop("expert_load")
        old.append({"schema_version": SCHEMA_VERSION, "record": values})
    path = tmp_path / QUALITY_JOURNAL
    path.write_bytes(render_json_lines(old))
    assert read_quality(path) == tuple(records)


def test_a_changed_csv_is_written_anew(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    path = tmp_path / RESULTS_CSV
    whole = path.read_bytes()
    for damaged in (whole.replace(b"prompt 1", b"prompt 9"), whole[: len(whole) // 2], b"\0"):
        path.write_bytes(damaged)
        fill(tmp_path, range(0))
        assert path.read_bytes() == whole


def test_a_csv_with_rows_that_the_journal_lacks_is_kept(tmp_path: Path) -> None:
    """A journal cut at a line's end looks whole, and the CSV may be all that is left of it."""
    fill(tmp_path, range(3))
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / CHECKPOINT).unlink()
    for number in range(3):
        (tmp_path / JOURNAL).write_bytes(b"".join(lines[:number]))
        with pytest.raises(ResultsError, match=f"it has {number} experiments, .* has 3 rows"):
            open_store(tmp_path)
    assert len(csv_prompts(tmp_path)) == 3


def test_a_journal_removed_since_it_was_read_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL
    journal = Journal.resume(path, as_object, seed="seed", remedy="")
    journal.open()
    journal.append({"n": 0})
    journal.close()
    read = Journal.resume(path, as_object, seed="seed", remedy="")
    path.unlink()
    for begun in (journal, read):
        with pytest.raises(ResultsError, match="removed or replaced"):
            begun.open()
        assert not path.exists()
