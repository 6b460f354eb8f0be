"""The truth about a run: an append-only file, one fsynced line per finished experiment.

Each line's checksum covers the line and the checksum before it, so a line that was edited,
removed from the middle or copied from another run is found. A last line without its newline is
what a crash leaves while writing; such an experiment never finished, so the line is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, get_type_hints

from bh_routing.errors import ResultsError
from bh_routing.experiments.files import plain_json, sync_folder
from bh_routing.records import (
    JOURNAL,
    SCHEMA_VERSION,
    ExperimentDetail,
    ExperimentRecord,
)

_FLOAT_FIELDS: Final = frozenset(
    name for name, kind in get_type_hints(ExperimentRecord).items() if kind is float
)
WAYS_OUT: Final = "start over with --no-resume, or choose another --output"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One finished experiment."""

    key: str
    record: ExperimentRecord
    detail: ExperimentDetail
    checksum: str


class JournalContent(NamedTuple):
    """What is on disk and fits its checksums."""

    entries: list[Entry]
    valid_bytes: int
    """Length of the file without a torn last line."""
    torn_bytes: int
    """Length of a torn last line, 0 if there is none."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of keys."""
    text = json.dumps(plain_json(value), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def read_journal(path: Path, seed: str) -> JournalContent:
    """Read the entries of a journal and check the chain of checksums.

    Args:
        path: the journal; a missing file is an empty journal.
        seed: what the first checksum builds on: the run's own fingerprint.
    Raises:
        ResultsError: a line doesn't fit its checksum, or isn't a line of a journal.
    """
    if not path.exists():
        return JournalContent([], 0, 0)
    content = path.read_bytes()
    *lines, torn = content.split(b"\n")
    entries: list[Entry] = []
    previous = seed
    for number, line in enumerate(lines, start=1):
        entry = _parse_line(line, previous, where=f"line {number} of {path}")
        entries.append(entry)
        previous = entry.checksum
    return JournalContent(entries, len(content) - len(torn), len(torn))


class JournalWriter:
    """Append entries to a journal; each is on disk when `append` returns."""

    def __init__(self, path: Path, content: JournalContent, seed: str) -> None:
        is_new = not path.exists()
        self._last_checksum = content.entries[-1].checksum if content.entries else seed
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if content.torn_bytes:
            os.ftruncate(self._descriptor, content.valid_bytes)
            os.fsync(self._descriptor)
        if is_new:
            sync_folder(path.parent)

    def append(self, key: str, record: ExperimentRecord, detail: ExperimentDetail) -> Entry:
        """Write one line and wait until the disk has it."""
        body = _body(key, asdict(record), asdict(detail))
        checksum = _checksum(self._last_checksum, body)
        line = json.dumps(
            {**body, "checksum": checksum},
            ensure_ascii=False,
            separators=(",", ":"),
            allow_nan=False,
        )
        # One write call: a signal handler can't come between two halves of a line.
        data = f"{line}\n".encode()
        if os.write(self._descriptor, data) != len(data):
            raise OSError(f"only part of a line could be written to {JOURNAL}; is the disk full?")
        os.fsync(self._descriptor)
        self._last_checksum = checksum
        return Entry(key=key, record=record, detail=detail, checksum=checksum)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)


def _body(key: str, record: dict[str, Any], detail: dict[str, Any]) -> dict[str, Any]:
    body = {"schema_version": SCHEMA_VERSION, "key": key, "record": record, "detail": detail}
    plain: dict[str, Any] = plain_json(body)
    return plain


def _checksum(previous: str, body: Mapping[str, Any]) -> str:
    return digest([previous, body])


def _parse_line(line: bytes, previous: str, where: str) -> Entry:
    try:
        content = json.loads(line)
        stored = content.pop("checksum")
        if content["schema_version"] != SCHEMA_VERSION:
            raise ResultsError(
                f"{where} has schema version {content['schema_version']}, this version of "
                f"bh-routing writes {SCHEMA_VERSION}; {WAYS_OUT}"
            )
        if stored != _checksum(previous, content):
            raise ResultsError(
                f"{where} doesn't fit its checksum: it or a line before it was edited or removed, "
                f"or it is of another run; {WAYS_OUT}"
            )
        return Entry(
            key=content["key"],
            record=_record_from(content["record"]),
            detail=ExperimentDetail(**content["detail"]),
            checksum=stored,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ResultsError):
            raise
        raise ResultsError(f"{where} can't be read as an experiment; {WAYS_OUT}") from error


def _record_from(values: Mapping[str, Any]) -> ExperimentRecord:
    restored: dict[str, Any] = {
        name: float("nan") if value is None and name in _FLOAT_FIELDS else value
        for name, value in values.items()
    }
    return ExperimentRecord(**restored)
