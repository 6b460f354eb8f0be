"""What the machine does to a run: full disks, lost folders, wrong clocks, signals, large grids."""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.large_grid import measure
from bh_routing.errors import ResultsError
from bh_routing.experiments import store as store_module
from bh_routing.experiments.calibrating import save_calibration
from bh_routing.experiments.quality import QualityLedger
from bh_routing.experiments.quality_text import QualityText
from bh_routing.experiments.run_log import RunLog
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.files import write_atomically
from bh_routing.results.records import CALIBRATION, CHECKPOINT, JOURNAL, RESULTS_CSV
from tests.experiments.conftest import make_detail, make_record, read_folder
from tests.experiments.test_store import IDENTITY, PLAN, csv_prompts, fill, open_store


def keys(folder: Path) -> list[str]:
    lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["key"] for line in lines]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write, real_fsync = os.write, os.fsync

    def write_a_part(descriptor: int, data: bytes) -> int:
        return real_write(descriptor, data[: int(share * len(data))])

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_store(tmp_path) as store:
        store.begin(IDENTITY, {}, PLAN)
        store.add("key-0", make_record(text="prompt 0"), make_detail())
        whole = (tmp_path / JOURNAL).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_a_part)
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(ResultsError, match="No space left on device"):
                store.add("key-1", make_record(text="prompt 1"), make_detail())
        assert (tmp_path / JOURNAL).read_bytes() == whole
        assert (os.write, os.fsync) == (real_write, real_fsync)
        store.add("key-2", make_record(text="prompt 2"), make_detail())
    assert keys(tmp_path) == ["key-0", "key-2"]
    fill(tmp_path, range(1, 2))
    assert csv_prompts(tmp_path) == ["prompt 0", "prompt 1", "prompt 2"]


def test_a_folder_that_was_moved_stops_the_run_and_is_not_made_again(tmp_path: Path) -> None:
    folder, away = tmp_path / "results", tmp_path / "away"
    with pytest.raises(ResultsError, match="removed or replaced"), open_store(folder) as store:
        store.begin(IDENTITY, {}, PLAN)
        store.add("key-0", make_record(text="prompt 0"), make_detail())
        folder.rename(away)
        store.add("key-1", make_record(text="prompt 1"), make_detail())
    assert not folder.exists()
    away.rename(folder)
    fill(folder, range(2, 3))
    assert csv_prompts(folder) == ["prompt 0", "prompt 1", "prompt 2"]


def test_a_folder_that_was_moved_before_scoring_is_not_made_again(tmp_path: Path) -> None:
    text = QualityText(documents=(), sha256="", max_tokens=9, window=9, stride=9, batch_size=1)
    with (
        pytest.raises(ResultsError, match="No such file or directory"),
        QualityLedger(tmp_path / "results", text, IDENTITY),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_moved_before_its_calibration_is_not_made_again(
    demo_calibration: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(ResultsError, match="No such file or directory"):
        save_calibration(demo_calibration, tmp_path / "results")
    assert not list(tmp_path.iterdir())
    save_calibration(demo_calibration, tmp_path)
    assert Calibration.load(tmp_path / CALIBRATION).fingerprint == demo_calibration.fingerprint


def test_an_error_of_the_run_is_not_hidden_by_one_of_its_last_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise ResultsError("the disk is full")

    with pytest.raises(KeyboardInterrupt), open_store(tmp_path) as store:
        store.begin(IDENTITY, {}, PLAN)
        monkeypatch.setattr(store_module, "write_atomically", refuse)
        raise KeyboardInterrupt
    assert "the disk is full" in caplog.text


def test_a_clock_that_goes_backwards_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Backwards(datetime):
        hours = 0

        @classmethod
        def now(cls, tz: object = None) -> Backwards:
            cls.hours += 1
            return cls(2026, 1, 2, tzinfo=UTC) - timedelta(hours=cls.hours)

    monkeypatch.setattr(store_module, "datetime", Backwards)
    monkeypatch.setattr(store_module, "REFRESH_SEC", 0.0)
    fill(tmp_path, range(3))
    fill(tmp_path, range(3, 5))
    assert keys(tmp_path) == PLAN[:5]
    assert json.loads((tmp_path / CHECKPOINT).read_bytes())["finished"] == 5
    before = read_folder(tmp_path)
    with open_store(tmp_path, resume=False) as store:
        store.begin(IDENTITY, {}, PLAN)
    (moved,) = tmp_path.glob("previous-*")
    assert read_folder(moved) == {k: v for k, v in before.items() if k != ".lock"}


def test_a_log_on_a_full_disk_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunLog() as run_log:
        run_log.write_to(tmp_path / "log.txt")
        store_module.log.info("one")
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            store_module.log.info("two")
        store_module.log.info("three")
    assert (
        "one" in (tmp_path / "log.txt").read_text()
        and "three" in (tmp_path / "log.txt").read_text()
    )
    assert capsys.readouterr().err == ""


def test_a_csv_is_rendered_less_often_the_longer_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    real = write_atomically
    renderings = []

    def take_a_second(path: Path, content: bytes) -> None:
        now[0] += 1.0
        renderings.append(path.name)
        real(path, content)

    monkeypatch.setattr(
        "bh_routing.experiments.store.time", SimpleNamespace(monotonic=lambda: now[0])
    )
    with open_store(tmp_path, interval=100) as store:
        store.begin(IDENTITY, {}, PLAN)
        monkeypatch.setattr(store_module, "write_atomically", take_a_second)
        now[0] = 2.0  # the first rendering took no time
        for number in range(60):
            store.add("key-0", make_record(text=f"prompt {number}"), make_detail())
            now[0] += 1.0
        # One second of rendering in about twenty.
        assert 2 <= renderings.count(RESULTS_CSV) <= 4


def test_a_large_grid_costs_the_driver_the_same_at_its_end(tmp_path: Path) -> None:
    found = measure(tmp_path, 400)
    assert found["memory_growth_mib"] < 30
    assert found["last_tenth_ms"] < 100, "a guard against growth, whatever else the machine does"


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_ten_thousand_experiments_cost_5_ms_each_and_no_memory(tmp_path: Path) -> None:
    found = measure(tmp_path, 10_000)
    assert found["memory_growth_mib"] <= 200
    assert found["first_tenth_ms"] <= 5, found
    assert found["last_tenth_ms"] <= 5, found
