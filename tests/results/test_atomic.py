"""A written file is whole and as readable as any new file, or there is one sentence why not."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bh_routing.errors import ResultsError
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.files import write_atomically, write_text


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_writer_honours_the_umask(
    tmp_path: Path, demo_calibration: Calibration, umask: int
) -> None:
    before = os.umask(umask)
    try:
        written = [
            write_atomically(tmp_path / "run.json", b"{}"),
            write_text(tmp_path / "plots" / "REPORT.md", "text"),
            demo_calibration.save(tmp_path / "c.safetensors"),
        ]
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_one_sentence_for_every_writer(
    tmp_path: Path, demo_calibration: Calibration
) -> None:
    writers: list[Callable[[], Path]] = [
        lambda: write_atomically(tmp_path / "records.csv", bytes(2000)),
        lambda: write_text(tmp_path / "report.html", "x" * 2000),
        lambda: demo_calibration.save(tmp_path / "c.safetensors"),
    ]
    for write in writers:
        with pytest.raises(ResultsError, match=r"can't be written \(File too large\); make room"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_the_longest_name_that_the_system_takes_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"
