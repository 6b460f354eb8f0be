"""Read an earlier run's folder, and reject it if its files were changed since.

Nothing here writes. Each error names the file and the remedies.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import TypeAdapter, ValidationError

from bh_routing.errors import ResultsError
from bh_routing.results.files import read_json_object, render_csv_row
from bh_routing.results.journal import WAYS_OUT, Entry, JournalContent, read_journal
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
_PUT_BACK: Final = f"put it back, or {WAYS_OUT}"
_PLANS: Final = TypeAdapter(list[list[str]])


class StoredRun(NamedTuple):
    """A resumable run."""

    document: dict[str, Any]
    """Content of run.json."""
    content: JournalContent


def read_stored_run(folder: Path) -> StoredRun | None:
    """Read and check an earlier run; None if there is none.

    Raises:
        ResultsError: a file was edited or truncated, or isn't a run's.
    """
    if not (folder / RUN_JSON).exists():
        _refuse_without_run_json(folder)
        return None
    document = read_json_object(folder / RUN_JSON, _PUT_BACK)
    identity = document.get("identity")
    try:
        plans = _PLANS.validate_python(document.get("plans"), strict=True)
    except ValidationError:
        plans = None
    if not isinstance(identity, dict) or plans is None:
        raise ResultsError(f"{folder / RUN_JSON} isn't of a bh-routing run; {WAYS_OUT}")
    if identity.get("schema_version") != SCHEMA_VERSION:
        raise ResultsError(
            f"{folder} has schema {identity.get('schema_version')}, this version of bh-routing "
            f"writes schema {SCHEMA_VERSION}; {WAYS_OUT}"
        )
    content = read_journal(folder / JOURNAL, journal_seed(identity))
    _check_checkpoint(folder / CHECKPOINT, content.entries)
    _check_csv(folder / RESULTS_CSV, content.entries, plans)
    return StoredRun(document, content)


def render_header() -> str:
    """Render the first line of the CSV of experiments."""
    return render_csv_row(CSV_COLUMNS)


def render_row(record: ExperimentRecord) -> str:
    """Render one record as a row of the CSV of experiments."""
    return render_csv_row(getattr(record, name) for name in CSV_COLUMNS)


def latest_entries(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Return the last entry per key, since a retried experiment has several."""
    return {entry.key: entry for entry in entries}


def _refuse_without_run_json(folder: Path) -> None:
    for name in OWN_NAMES:
        if (folder / name).exists():
            raise ResultsError(
                f"{folder} holds {name} but no {RUN_JSON}, so it can't be told which run it is of; "
                "choose another --output, or use --no-resume, which moves it aside"
            )


def _check_checkpoint(path: Path, entries: Sequence[Entry]) -> None:
    """Raise if the journal is shorter than the checkpoint, which is written after its lines."""
    if not path.exists():
        return
    checkpoint = read_json_object(path, _PUT_BACK)
    finished, checksum = checkpoint.get("finished"), checkpoint.get("last_checksum")
    if not isinstance(finished, int) or finished < 0:
        raise ResultsError(f"{path} was edited; delete it to go on, or {WAYS_OUT}")
    if finished > len(entries):
        raise ResultsError(
            f"{path.parent.parent / JOURNAL} is truncated: it has {len(entries)} lines, "
            f"{CHECKPOINT} was written after {finished}; put the whole file back, or {WAYS_OUT}"
        )
    if finished and entries[finished - 1].checksum != checksum:
        raise ResultsError(
            f"{path} doesn't belong to {JOURNAL}: one of them was edited or is of another run; "
            f"{WAYS_OUT}"
        )


def _check_csv(path: Path, entries: Sequence[Entry], plans: Sequence[Sequence[str]]) -> None:
    """Raise if the CSV contradicts the journal; it may lag behind it by about a second."""
    if not path.exists():
        return
    text = path.read_bytes().decode(errors="replace")
    if any(_is_rendering_of_a_prefix(text, entries, plan) for plan in plans):
        return
    raise ResultsError(
        f"{path} says something else than {JOURNAL}: one of them was edited or truncated; move the "
        f"CSV away to have it written anew from {JOURNAL}, or {WAYS_OUT}"
    )


def _is_rendering_of_a_prefix(text: str, entries: Sequence[Entry], plan: Sequence[str]) -> bool:
    planned = set(plan)
    rows: dict[str, str] = {}
    length = len(render_header())
    if text == render_header():
        return True
    for entry in entries:
        if entry.key not in planned:
            continue
        row = render_row(entry.record)
        length += len(row) - len(rows.get(entry.key, ""))
        rows[entry.key] = row
        if length == len(text) and text == render_header() + "".join(
            rows[key] for key in plan if key in rows
        ):
            return True
    return False
