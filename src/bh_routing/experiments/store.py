"""The results folder, with one run at a time: it never loses results nor touches other files.

The journal is authoritative; the CSV and the checkpoint are rendered from it. Opening only reads,
so a rejected folder stays unchanged; `begin` is the first call that writes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from filelock import FileLock, Timeout

from bh_routing.errors import ResultsError
from bh_routing.experiments.folder import (
    LOCK,
    OWN_NAMES,
    WAYS_OUT,
    StoredRun,
    in_use,
    move_aside,
    read_stored_run,
    reject_links,
    remove_leftovers,
    render_header,
    render_row,
)
from bh_routing.experiments.identity import RunIdentity
from bh_routing.results.files import render_json, unwritable, write_atomically
from bh_routing.results.journal import Entry, Journal, to_values
from bh_routing.results.records import (
    CHECKPOINT,
    JOURNAL,
    RESULTS_CSV,
    RUN_JSON,
    SCHEMA_VERSION,
    STATUS_OK,
    SUMMARY_JSON,
    ExperimentDetail,
    ExperimentRecord,
)

REFRESH_SEC: Final = 1.0
"""Minimum pause between two renderings of a derived file."""
REFRESH_PATIENCE: Final = 20.0
"""Seconds of pause per second of the last rendering: a large grid mustn't wait for its CSV."""

log = logging.getLogger(__name__)


class ResultStore:
    """The only writer of a results folder; a context manager.

    Args:
        folder: the results folder; it need not exist.
        resume: resume the folder's run; otherwise `begin` moves it aside.
        checkpoint_interval: finished experiments between two snapshots.
    Raises:
        ResultsError: the folder is in use, was edited or truncated, or holds other files.
    """

    def __init__(self, folder: Path, *, resume: bool, checkpoint_interval: int) -> None:
        self.folder = folder
        self.stored: StoredRun | None = None
        """The run to resume; None if there is none, or if it will be moved aside."""
        self._resume = resume
        self._interval = checkpoint_interval
        self._plan: list[str] = []
        self._latest: dict[str, ExperimentRecord] = {}
        self._rows: dict[str, str] = {}
        self._document: dict[str, Any] = {}
        self._journal: Journal[Entry] = Journal(path=folder / JOURNAL)
        self._lock: FileLock | None = None
        self._lock_is_new = False
        self._refresh_after = self._snapshot_after = float("-inf")
        self._snapshot_is_due = False
        self._open()

    def check(self, identity: RunIdentity) -> None:
        """Reject mixing results with those of another model, dtype, device or length.

        Raises:
            ResultsError: the folder's run differs; the error names the differences and remedies.
        """
        if self.stored is None:
            return
        found = identity.differences(self.stored.document["identity"])
        if found:
            raise ResultsError(
                f"{self.folder} holds results of another run ({'; '.join(found)}); {WAYS_OUT}"
            )

    def begin(
        self, identity: RunIdentity, document: Mapping[str, Any], plan: Sequence[str]
    ) -> None:
        """Write run.json and open the folder for writing; experiments can be added from here on.

        Args:
            identity: properties that all experiments of the folder share.
            document: content of run.json in addition to identity and plans.
            plan: keys of all experiments, in the CSV's order.
        Raises:
            ResultsError: the folder isn't writable, or another run has locked it.
        """
        self.check(identity)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                reject_links(self.folder)
                self._acquire_lock()
                read_stored_run(self.folder)
                if (self.folder / RUN_JSON).exists():
                    raise ResultsError(f"another run has just begun in {self.folder}; {WAYS_OUT}")
            if not self._resume:
                move_aside(self.folder)
            remove_leftovers(self.folder)
            self._take_over(identity, document, plan)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def finished_record(self, key: str) -> ExperimentRecord | None:
        """Return the row of a finished experiment; None if it is missing or failed."""
        record = self._latest.get(key)
        return record if record is not None and record.status == STATUS_OK else None

    @property
    def records(self) -> list[ExperimentRecord]:
        """Existing rows of the plan, in the CSV's order."""
        return [self._latest[key] for key in self._plan if key in self._latest]

    @property
    def num_unplanned(self) -> int:
        """Number of finished experiments in the journal that aren't in the plan."""
        return len(self._latest.keys() - set(self._plan))

    def add(self, key: str, record: ExperimentRecord, detail: ExperimentDetail) -> None:
        """Append one experiment, which is on disk when this returns.

        Raises:
            ResultsError: the disk is full, or the folder is gone.
        """
        self._journal.append({"key": key, "record": to_values(record), "detail": to_values(detail)})
        self._latest[key], self._rows[key] = record, render_row(record)
        if len(self._journal.checksums) % self._interval == 0:
            self._snapshot_is_due = True
        self._refresh()

    @property
    def document(self) -> Mapping[str, Any]:
        """Content of run.json."""
        return self._document

    def update_document(self, changes: Mapping[str, Any]) -> None:
        """Replace some top-level keys of run.json."""
        self._document.update(changes)
        write_atomically(self.folder / RUN_JSON, render_json(self._document))

    def flush(self) -> None:
        """Bring the CSV and the checkpoint up to date now."""
        self._snapshot_is_due = True
        self._refresh_after = self._snapshot_after = float("-inf")
        self._refresh()

    def close(self) -> None:
        """Write the derived files and release the folder; may be called twice.

        Raises:
            ResultsError: the derived files can't be written; the journal is complete.
        """
        began = self._journal.is_open
        try:
            if began:
                self.flush()
        finally:
            self._journal.close()
            self._release_lock(undo=not began)

    def __enter__(self) -> ResultStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except ResultsError as problem:
            if error is None:
                raise
            # The error that ended the run matters more than a CSV behind its journal.
            log.warning("%s", problem)

    def _open(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ResultsError(f"{self.folder} is a file; choose a folder as --output")
        reject_links(self.folder)
        if not any((self.folder / name).exists() for name in OWN_NAMES):
            return
        try:
            self._acquire_lock()
            if self._resume:
                self.stored = read_stored_run(self.folder)
        except OSError as error:
            self._release_lock(undo=True)
            raise ResultsError(
                f"{self.folder} can't be read ({error.strerror or error}); choose another --output"
            ) from error
        except BaseException:
            self._release_lock(undo=True)
            raise

    def _acquire_lock(self) -> None:
        path = self.folder / LOCK
        self._lock_is_new = not path.exists()
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise in_use(self.folder) from None
        self._lock = lock

    def _release_lock(self, *, undo: bool) -> None:
        lock, self._lock = self._lock, None
        if lock is None:
            return
        if undo and self._lock_is_new:
            (self.folder / LOCK).unlink(missing_ok=True)
        lock.release()

    def _take_over(
        self, identity: RunIdentity, document: Mapping[str, Any], plan: Sequence[str]
    ) -> None:
        plans, is_changed = [], False
        tables = identity.tables
        if self.stored is not None:
            plans = [old for old in self.stored.document["plans"] if old != list(plan)]
            is_changed = self.stored.document["plans"][-1:] != [list(plan)]
            tables = {**self.stored.document["identity"]["tables"], **identity.tables}
        identity_document = asdict(replace(identity, tables=tables))
        self._plan = list(plan)
        # If this run is killed, the CSV on disk may still follow an earlier plan.
        self._document = {
            **document,
            "identity": identity_document,
            "plans": [*plans, self._plan],
        }
        write_atomically(self.folder / RUN_JSON, render_json(self._document))
        if is_changed:
            # If this run is killed, the summary would describe other experiments by these names.
            (self.folder / SUMMARY_JSON).unlink(missing_ok=True)
        # After run.json, without which any other file of a run is rejected.
        (self.folder / CHECKPOINT).parent.mkdir(exist_ok=True)
        if self.stored is not None:
            self._journal = self.stored.journal
        self._journal.seed = identity.journal_seed()
        if self._journal.torn_bytes:
            log.warning(
                "dropped the unfinished last line of %s (%d bytes): a run was cut off while "
                "writing it; its experiment runs again",
                JOURNAL,
                self._journal.torn_bytes,
            )
        # The last of several: a retried experiment has a line per try.
        self._latest = {entry.key: entry.record for entry in self._journal.items}
        self._rows = {key: render_row(record) for key, record in self._latest.items()}
        self._journal.open()
        self._refresh()

    def _refresh(self) -> None:
        """Render the derived files, each at most about once per second."""
        start = time.monotonic()
        if start >= self._refresh_after:
            self._journal.check_place()
            rows = (self._rows[key] for key in self._plan if key in self._rows)
            text = render_header() + "".join(rows)
            write_atomically(self.folder / RESULTS_CSV, text.encode())
            self._refresh_after = _end_of_pause(start)
        start = time.monotonic()
        if self._snapshot_is_due and start >= self._snapshot_after:
            write_atomically(self.folder / CHECKPOINT, render_json(self._snapshot()))
            self._snapshot_after = _end_of_pause(start)
            self._snapshot_is_due = False

    def _snapshot(self) -> dict[str, Any]:
        done = {key: self._latest[key] for key in self._plan if key in self._latest}
        checksums = self._journal.checksums
        return {
            "schema_version": SCHEMA_VERSION,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": len(checksums),
            "last_checksum": checksums[-1] if checksums else "",
            "planned": len(self._plan),
            "completed": sum(record.status == STATUS_OK for record in done.values()),
            "failed": sum(record.status != STATUS_OK for record in done.values()),
            "records": [{"key": key, **to_values(record)} for key, record in done.items()],
        }


def _end_of_pause(start: float) -> float:
    """Return the time when a file whose rendering began at `start` may be rendered again."""
    now = time.monotonic()
    return now + REFRESH_SEC * max(1.0, REFRESH_PATIENCE * (now - start))
