from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bh_routing.errors import ResultsError
from bh_routing.experiments import store as store_module
from bh_routing.experiments.identity import RunIdentity
from bh_routing.experiments.store import ResultStore
from bh_routing.results.records import (
    CHECKPOINT,
    JOURNAL,
    REPORT_MD,
    RESULTS_CSV,
    RUN_JSON,
    STATUS_FAILED,
)
from tests.experiments.conftest import make_detail, make_record, read_folder

IDENTITY = RunIdentity(
    model="demo",
    model_fingerprint="f" * 64,
    settings={"config": {"norm_topk_prob": False}},
    tokenizer="1" * 64,
    dtype="float32",
    device_type="cpu",
    device_name="H100",
    versions={"torch": "2.12.0"},
    max_tokens=4,
)
PLAN = [f"key-{i}" for i in range(6)]


def open_store(folder: Path, *, resume: bool = True, interval: int = 2) -> ResultStore:
    return ResultStore(folder, resume=resume, checkpoint_interval=interval)


def fill(folder: Path, numbers: range, *, plan: list[str] = PLAN, failed: bool = False) -> None:
    """Do a run that finishes these experiments of the plan."""
    with open_store(folder) as store:
        store.begin(IDENTITY, {"provenance": {}}, plan)
        for i in numbers:
            status = {"status": STATUS_FAILED} if failed else {}
            store.add(f"key-{i}", make_record(text=f"prompt {i}", **status), make_detail())


def csv_prompts(folder: Path) -> list[str]:
    with (folder / RESULTS_CSV).open(newline="", encoding="utf-8") as file:
        return [row["prompt_text"] for row in csv.DictReader(file)]


def test_a_finished_experiment_is_on_disk_before_add_returns(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with open_store(folder) as store:
        store.begin(IDENTITY, {}, PLAN)
        store.add("key-0", make_record(), make_detail())
        line = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
    assert line["key"] == "key-0"
    assert line["record"]["generated_text"] == 'b, "c"\r\nd'
    assert line["record"]["max_experts"] is None
    assert line["detail"]["expert_load"] == [[1, 2]]


def test_the_csv_follows_the_plan_not_the_order_of_finishing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.begin(IDENTITY, {}, PLAN)
        for i in (4, 0, 2):
            store.add(f"key-{i}", make_record(text=f"prompt {i}"), make_detail())
    assert csv_prompts(tmp_path) == ["prompt 0", "prompt 2", "prompt 4"]


def test_the_checkpoint_is_a_snapshot_every_few_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "REFRESH_SEC", 0.0)
    path = tmp_path / CHECKPOINT
    finished = []
    with open_store(tmp_path, interval=2) as store:
        store.begin(IDENTITY, {}, PLAN)
        for i in range(5):
            store.add(f"key-{i}", make_record(text=f"prompt {i}"), make_detail())
            finished.append(json.loads(path.read_bytes())["finished"] if path.exists() else 0)
    assert finished == [0, 2, 2, 4, 4]
    last = json.loads(path.read_bytes())
    assert (last["finished"], last["planned"], last["failed"]) == (5, 6, 0)


def test_derived_files_are_refreshed_at_most_once_a_second(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.begin(IDENTITY, {}, PLAN)
        for i in range(6):
            store.add(f"key-{i}", make_record(text=f"prompt {i}"), make_detail())
        # Six journal lines took far less than a second.
        assert csv_prompts(tmp_path) == []
    assert len(csv_prompts(tmp_path)) == 6


def test_a_resumed_store_knows_what_is_finished(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    with open_store(tmp_path) as store:
        store.begin(IDENTITY, {}, PLAN)
        assert [store.finished_record(key) is not None for key in PLAN] == [True] * 3 + [False] * 3


def test_a_failed_experiment_is_not_finished_and_its_retry_replaces_the_row(
    tmp_path: Path,
) -> None:
    fill(tmp_path, range(1), failed=True)
    with open_store(tmp_path) as store:
        store.begin(IDENTITY, {}, PLAN)
        assert store.finished_record("key-0") is None
        store.add("key-0", make_record(text="prompt 0"), make_detail())
    fill(tmp_path, range(0))
    with (tmp_path / RESULTS_CSV).open(newline="", encoding="utf-8") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["ok"]
    assert len((tmp_path / JOURNAL).read_bytes().splitlines()) == 2


def test_another_plan_reuses_rows_and_loses_none(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    fill(tmp_path, range(0), plan=["key-5", "key-3", "key-1"])
    assert csv_prompts(tmp_path) == ["prompt 3", "prompt 1"]
    fill(tmp_path, range(4, 6))
    assert csv_prompts(tmp_path) == [f"prompt {i}" for i in range(6)]


def test_a_run_killed_between_run_json_and_csv_can_go_on(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    old_csv = (tmp_path / RESULTS_CSV).read_bytes()
    fill(tmp_path, range(0), plan=["key-2"])
    (tmp_path / RESULTS_CSV).write_bytes(old_csv)
    fill(tmp_path, range(0), plan=["key-2"])
    assert csv_prompts(tmp_path) == ["prompt 2"]


def test_a_torn_last_line_is_dropped_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, range(2))
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"schema_version":1,"key":"key-2","rec')
    fill(tmp_path, range(2, 3))
    fill(tmp_path, range(3, 4))
    assert csv_prompts(tmp_path) == [f"prompt {i}" for i in range(4)]
    assert "dropped the unfinished last line" in caplog.text


def drop_last_line(folder: Path) -> None:
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join(lines[:-1]))


def drop_middle_line(folder: Path) -> None:
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join(lines[:1] + lines[2:]))


def drop_journal_and_csv(folder: Path) -> None:
    (folder / JOURNAL).unlink()
    (folder / RESULTS_CSV).unlink()


def drop_journal_and_checkpoint(folder: Path) -> None:
    (folder / JOURNAL).unlink()
    (folder / CHECKPOINT).unlink()


def substitute(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new, 1))

    return change


def drop_run_json(folder: Path) -> None:
    (folder / RUN_JSON).unlink()


def cut_run_json(folder: Path) -> None:
    (folder / RUN_JSON).write_bytes(b'{"spec": ')


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (drop_last_line, "truncated"),
        (drop_middle_line, "line 2"),
        (drop_journal_and_csv, "truncated"),
        (drop_journal_and_checkpoint, "truncated"),
        (substitute(JOURNAL, b"prompt 1", b"prompt 9"), "line 2"),
        (substitute(JOURNAL, b'"schema_version":1', b'"schema_version":9'), "schema"),
        (substitute(CHECKPOINT, b'"finished": 3', b'"finished": "3"'), "edited"),
        (substitute(CHECKPOINT, b'"last_checksum": "', b'"last_checksum": "0'), "belong"),
        (substitute(RUN_JSON, b'"max_tokens": 4', b'"max_tokens": 5'), "line 1"),
        (cut_run_json, "run.json"),
        (drop_run_json, "no run.json"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_folder_is_refused_and_stays_as_it_is(
    tmp_path: Path, damage: Callable[[Path], None], part: str
) -> None:
    folder = tmp_path / "results"
    fill(folder, range(3))
    damage(folder)
    before = read_folder(folder)
    with pytest.raises(ResultsError, match=part) as caught:
        open_store(folder)
    assert "--output" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_folder(folder) == before


def test_no_resume_moves_the_old_run_aside_and_touches_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (tmp_path / "notes.txt").write_text("mine")
    before = {name: content for name, content in read_folder(tmp_path).items() if name != ".lock"}
    for number in range(2):
        with open_store(tmp_path, resume=False) as store:
            store.begin(IDENTITY, {}, PLAN)
            assert store.finished_record("key-0") is None
        assert len(list(tmp_path.glob("previous-*"))) == number + 1
    moved = min(tmp_path.glob("previous-*"), key=lambda path: path.name)
    kept = read_folder(moved) | {"notes.txt": (tmp_path / "notes.txt").read_bytes()}
    assert kept == before


def test_no_resume_takes_a_damaged_run_too(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    drop_middle_line(tmp_path)
    with open_store(tmp_path, resume=False) as store:
        store.begin(IDENTITY, {}, PLAN)
    assert csv_prompts(tmp_path) == []


def test_a_folder_with_other_files_is_shared_but_none_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    fill(tmp_path, range(1))
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / REPORT_MD).write_text("mine")
    with pytest.raises(ResultsError, match=r"holds REPORT.md but no run.json"):
        open_store(tmp_path)
    assert read_folder(tmp_path) == {REPORT_MD: b"mine"}


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.begin(IDENTITY, {}, PLAN)
        store.add("key-0", make_record(), make_detail())
        before = read_folder(tmp_path)
        for resume in (True, False):
            with pytest.raises(ResultsError, match="another run is writing to"):
                open_store(tmp_path, resume=resume)
        assert read_folder(tmp_path) == before
    fill(tmp_path, range(1, 2))


def test_of_two_runs_that_start_in_an_empty_folder_one_is_refused(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    first.begin(IDENTITY, {}, PLAN)
    with pytest.raises(ResultsError, match="another run is writing to"):
        second.begin(IDENTITY, {}, PLAN)
    first.close()
    third = open_store(tmp_path / "later")
    fill(tmp_path / "later", range(1))
    with pytest.raises(ResultsError, match="another run has just begun"):
        third.begin(IDENTITY, {}, PLAN)
    third.close()
    second.close()
    assert csv_prompts(tmp_path / "later") == ["prompt 0"]


def test_an_unused_store_leaves_no_folder(tmp_path: Path) -> None:
    with open_store(tmp_path / "results"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(ResultsError, match="is a file"):
        open_store(tmp_path / "results")


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        open_store(tmp_path / "file" / "results") as store,
        pytest.raises(ResultsError, match="can't be written"),
    ):
        store.begin(IDENTITY, {}, PLAN)


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    leftovers = [
        tmp_path / f".{RESULTS_CSV}.abc.tmp",
        tmp_path / "checkpoints" / ".latest_checkpoint.json.abc.tmp",
    ]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    fill(tmp_path, range(0))
    assert not any(leftover.exists() for leftover in leftovers)
