"""The folder of a run: its lock, an earlier run in it, and moving that run aside.

A folder whose files were changed is rejected. Each error names the file and the remedies.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from bh_routing.errors import ResultsError
from bh_routing.results.files import (
    TEMPORARY_SUFFIX,
    read_json_object,
    render_csv_row,
    sync_folder,
    unwritable,
)
from bh_routing.results.journal import Entry, Journal, parse_entry
from bh_routing.results.records import (
    CALIBRATION,
    CHECKPOINT,
    CSV_COLUMNS,
    JOURNAL,
    LOG,
    PLOTS,
    QUALITY_JOURNAL,
    REPORT_MD,
    RESULTS_CSV,
    RUN_JSON,
    SCHEMA_VERSION,
    SUMMARY_JSON,
    TIMINGS,
    TOKEN_TRACES,
    ExperimentDetail,
    ExperimentRecord,
    journal_seed,
)

OWN_NAMES: Final = (
    # First: the folder left by an interrupted move then raises an error with the remedy.
    RUN_JSON,
    JOURNAL,
    RESULTS_CSV,
    "checkpoints",
    SUMMARY_JSON,
    REPORT_MD,
    "report.html",
    LOG,
    PLOTS,
    CALIBRATION,
    QUALITY_JOURNAL,
    TIMINGS,
    TOKEN_TRACES,
)
"""All files and folders that a run writes into its folder."""
LOCK: Final = ".lock"
WAYS_OUT: Final = "start over with --no-resume, or choose another --output"
_PUT_BACK: Final = f"put it back, or {WAYS_OUT}"
_PLANS: Final = TypeAdapter(list[list[str]])

log = logging.getLogger(__name__)


class StoredRun(NamedTuple):
    """A resumable run."""

    document: dict[str, Any]
    """Content of run.json."""
    journal: Journal[Entry]
    """Its entries, without their details."""


def read_stored_run(folder: Path) -> StoredRun | None:
    """Read and check an earlier run; None if there is none.

    Raises:
        ResultsError: a file was edited or truncated, or isn't a run's.
    """
    if not (folder / RUN_JSON).exists():
        _reject_without_run_json(folder)
        return None
    document = read_json_object(folder / RUN_JSON, _PUT_BACK)
    identity = document.get("identity")
    try:
        plans = _PLANS.validate_python(document.get("plans"), strict=True)
    except ValidationError:
        plans = None
    if not isinstance(identity, dict) or plans is None:
        raise ResultsError(f"{folder / RUN_JSON} doesn't belong to a bh-routing run; {WAYS_OUT}")
    if identity.get("schema_version") != SCHEMA_VERSION:
        raise ResultsError(
            f"{folder} has schema {identity.get('schema_version')}, this version of bh-routing "
            f"writes schema {SCHEMA_VERSION}; {WAYS_OUT}"
        )
    journal = Journal.resume(
        folder / JOURNAL, _without_detail, seed=journal_seed(identity), remedy=WAYS_OUT
    )
    _check_checkpoint(folder / CHECKPOINT, journal.checksums)
    _check_length(folder / RESULTS_CSV, len({entry.key for entry in journal.items}))
    return StoredRun(document, journal)


def _without_detail(body: dict[str, Any]) -> Entry:
    """Parse a line, and drop the detail, which would fill the memory for a large grid."""
    return parse_entry(body)._replace(detail=ExperimentDetail())


def render_header() -> str:
    """Render the first line of the CSV of experiments."""
    return render_csv_row(CSV_COLUMNS)


def render_row(record: ExperimentRecord) -> str:
    """Render one record as a row of the CSV of experiments."""
    return render_csv_row(getattr(record, name) for name in CSV_COLUMNS)


def _reject_without_run_json(folder: Path) -> None:
    for name in OWN_NAMES:
        if (folder / name).exists():
            raise ResultsError(
                f"{folder} holds {name} but no {RUN_JSON}, so its run is unknown; "
                "choose another --output, or use --no-resume, which moves it aside"
            )


def _check_checkpoint(path: Path, checksums: list[str]) -> None:
    """Raise if the journal is shorter than the checkpoint, which is written after its lines."""
    if not path.exists():
        return
    checkpoint = read_json_object(path, _PUT_BACK)
    finished, checksum = checkpoint.get("finished"), checkpoint.get("last_checksum")
    if not isinstance(finished, int) or finished < 0:
        raise ResultsError(f"{path} was edited; delete it to continue, or {WAYS_OUT}")
    if finished > len(checksums):
        raise ResultsError(
            f"{path.parent.parent / JOURNAL} is truncated: it has {len(checksums)} lines, "
            f"{CHECKPOINT} was written after {finished}; put the whole file back, or {WAYS_OUT}"
        )
    if finished and checksums[finished - 1] != checksum:
        raise ResultsError(
            f"{path} doesn't belong to {JOURNAL}: one of them was edited or is another run's; "
            f"{WAYS_OUT}"
        )


def _check_length(path: Path, num_finished: int) -> None:
    """Raise if the CSV has more rows than the journal, from which it is written anew."""
    if not path.exists():
        return
    try:
        text = path.read_bytes().decode(errors="replace")
        num_rows = sum(1 for _ in csv.reader(io.StringIO(text, newline=""))) - 1
    except csv.Error:  # damaged, so it says nothing
        return
    if num_rows > num_finished:
        raise ResultsError(
            f"{path.parent / JOURNAL} is truncated: it has {num_finished} experiments, "
            f"{RESULTS_CSV} has {num_rows} rows; put the whole file back, move the CSV away to "
            f"have it written anew, or {WAYS_OUT}"
        )


def move_aside(folder: Path) -> None:
    """Move an earlier run's files into a new folder `previous-<time>`."""
    present = [name for name in OWN_NAMES if (folder / name).exists()]
    if not present:
        return
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    target = folder / f"previous-{stamp}"
    number = 1
    while target.exists():
        number += 1
        target = folder / f"previous-{stamp}-{number}"
    target.mkdir()
    for name in present:
        (folder / name).rename(target / name)
    sync_folder(folder)
    log.info("moved the earlier run to %s", target)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed run left."""
    for name in (*OWN_NAMES, CHECKPOINT):
        path = folder / name
        for leftover in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
            leftover.unlink(missing_ok=True)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Create a folder and lock it inside the block; for commands other than `run`.

    Raises:
        ResultsError: another process writes to the folder, or it isn't writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reject_links(folder)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise in_use(folder) from None
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def reject_links(folder: Path) -> None:
    """Raise ResultsError if a file that we write in the folder is a symbolic link."""
    for name in (*OWN_NAMES, LOCK, CHECKPOINT):
        path = folder / name
        if path.is_symlink():
            raise ResultsError(
                f"{path} is a symbolic link, and bh-routing writes nothing outside its output "
                "folder; remove the link, or choose another --output"
            )


def in_use(folder: Path) -> ResultsError:
    """Return the error for a folder that another process has locked."""
    return ResultsError(
        f"another run is writing to {folder}; wait until it ends, or choose another --output"
    )
