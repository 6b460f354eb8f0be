"""The journal of a run: one fsynced and checksummed line per finished experiment."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

from pydantic import TypeAdapter, ValidationError

from bh_routing.errors import ResultsError
from bh_routing.results.files import (
    JsonLines,
    half_read,
    read_json_lines,
    render_json_line,
    sync_folder,
    to_strict,
    unwritable,
)
from bh_routing.results.records import (
    SCHEMA_VERSION,
    ExperimentDetail,
    ExperimentRecord,
    json_digest,
    line_checksum,
)


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-like value, independent of key order."""
    return json_digest(to_strict(value))


def read_chained(path: Path, seed: str, remedy: str) -> JsonLines:
    """Read lines that must have checksums.

    Args:
        path: the file; a missing one counts as empty.
        seed: predecessor of the first line's checksum.
        remedy: advice at the end of an error message.
    Raises:
        ResultsError: a line isn't JSON, has another schema, or doesn't match its checksum.
    """
    lines = read_json_lines(path, seed, remedy)
    if len(lines.checksums) != len(lines.objects):
        raise half_read(path, "line 1 doesn't fit its checksum: it has none", remedy)
    return lines


class ChainedWriter:
    """Append checksummed lines; each is on disk when `append` returns."""

    def __init__(self, path: Path, content: JsonLines, seed: str) -> None:
        is_new = not path.exists()
        self._path = path
        self._last_checksum = content.checksums[-1] if content.checksums else seed
        self._length = content.valid_bytes
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            if content.torn_bytes:
                os.ftruncate(self._descriptor, self._length)
                os.fsync(self._descriptor)
            if is_new:
                sync_folder(path.parent)
        except OSError as error:
            raise unwritable(path, error) from error

    def append(self, body: Mapping[str, Any]) -> str:
        """Write one line, fsync it, and return its checksum.

        Raises:
            ResultsError: the disk is full, or the file was removed or replaced.
        """
        plain = {"schema_version": SCHEMA_VERSION, **to_strict(body)}
        checksum = line_checksum(self._last_checksum, plain)
        # One write call: a signal handler can't interrupt a line.
        data = render_json_line({**plain, "checksum": checksum})
        try:
            if os.write(self._descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            # An incomplete line before a later one would corrupt the whole file.
            with suppress(OSError):  # readers drop an incomplete last line
                os.ftruncate(self._descriptor, self._length)
            raise unwritable(self._path, error) from error
        self._length += len(data)
        self._last_checksum = checksum
        self.check_place()
        return checksum

    def check_place(self) -> None:
        """Raise ResultsError if the path no longer refers to the open file."""
        try:
            is_ours = os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except OSError:
            is_ours = False
        if not is_ours:
            raise ResultsError(
                f"{self._path} was removed or replaced while this run was writing it; put the "
                "folder back and give the same command again, or choose another --output"
            )

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


WAYS_OUT: Final = "start over with --no-resume, or choose another --output"
_FLOAT_FIELDS: Final = frozenset(
    name for name, kind in get_type_hints(ExperimentRecord).items() if kind is float
)
_KEY: Final = TypeAdapter(str)
_RECORD: Final = TypeAdapter(ExperimentRecord)
_DETAIL: Final = TypeAdapter(ExperimentDetail)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One finished experiment."""

    key: str
    record: ExperimentRecord
    detail: ExperimentDetail
    checksum: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalContent:
    """The verified entries of a journal; the default stands for a missing file."""

    entries: list[Entry] = field(default_factory=list)
    chain: JsonLines = field(default_factory=JsonLines)


def read_journal(path: Path, seed: str) -> JournalContent:
    """Read the entries of a journal and verify the chain of checksums.

    Args:
        path: the journal; a missing file counts as empty.
        seed: predecessor of the first checksum: the run's own fingerprint.
    Raises:
        ResultsError: a line doesn't match its checksum, or isn't a line of a journal.
    """
    chain = read_chained(path, seed, WAYS_OUT)
    entries = [
        _entry(body, checksum, where=f"line {number} of {path}")
        for number, (body, checksum) in enumerate(
            zip(chain.objects, chain.checksums, strict=True), start=1
        )
    ]
    return JournalContent(entries=entries, chain=chain)


class JournalWriter:
    """Append entries to a journal; each is on disk when `append` returns."""

    def __init__(self, path: Path, content: JournalContent, seed: str) -> None:
        self._writer = ChainedWriter(path, content.chain, seed)

    def append(self, key: str, record: ExperimentRecord, detail: ExperimentDetail) -> Entry:
        """Write one line and fsync it; raise ResultsError if it can't be written."""
        body = {"key": key, "record": to_values(record), "detail": to_values(detail)}
        checksum = self._writer.append(body)
        return Entry(key=key, record=record, detail=detail, checksum=checksum)

    def check_place(self) -> None:
        """Raise ResultsError if the journal was removed or replaced."""
        self._writer.check_place()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def to_values(item: ExperimentRecord | ExperimentDetail) -> dict[str, Any]:
    """Return field -> value without copies; `asdict` would copy every list."""
    return {f.name: getattr(item, f.name) for f in fields(item)}


def _entry(body: Mapping[str, Any], checksum: str, where: str) -> Entry:
    try:
        return Entry(
            key=_KEY.validate_python(body["key"]),
            record=_record(body["record"]),
            detail=_DETAIL.validate_python(body["detail"], extra="forbid"),
            checksum=checksum,
        )
    except (KeyError, AttributeError, ValidationError) as error:
        raise ResultsError(f"{where} isn't an experiment; {WAYS_OUT}") from error


def _record(values: Mapping[str, Any]) -> ExperimentRecord:
    restored: dict[str, Any] = {
        name: float("nan") if value is None and name in _FLOAT_FIELDS else value
        for name, value in values.items()
    }
    return _RECORD.validate_python(restored, extra="forbid")
