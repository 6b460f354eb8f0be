"""Journals: JSON lines files to which a run appends, each line fsynced and checksummed.

A line's checksum covers the line before it, so that a removed, doubled or copied line is found.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from bh_routing.errors import ResultsError
from bh_routing.results.files import (
    RESTORE,
    half_read,
    render_json_line,
    sync_folder,
    to_strict,
    unwritable,
)
from bh_routing.results.records import (
    SCHEMA_VERSION,
    ExperimentDetail,
    ExperimentRecord,
    QualityRecord,
    json_digest,
    line_checksum,
)

Item = TypeVar("Item")


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-like value, independent of key order."""
    return json_digest(to_strict(value))


def as_object(body: dict[str, Any]) -> dict[str, Any]:
    """Return a line as it is: the parser of a journal whose lines are dictionaries."""
    return body


@dataclass(kw_only=True, slots=True)
class Journal(Generic[Item]):
    """A JSON lines file, read whole; `open` makes it writable."""

    path: Path
    items: list[Item] = field(default_factory=list)
    """The complete lines that were read; `append` adds none, as their details fill the memory."""
    checksums: list[str] = field(default_factory=list)
    """One per line, appended ones included; empty if the lines have none."""
    torn_bytes: int = 0
    """Length of an incomplete last line, 0 if there is none."""
    seed: str = ""
    """Predecessor of the first line's checksum."""
    _length: int = 0
    _descriptor: int = -1

    @classmethod
    def read(
        cls,
        path: Path,
        parse: Callable[[dict[str, Any]], Item],
        *,
        seed: str | None = None,
        remedy: str = RESTORE,
    ) -> Journal[Item]:
        """Read every complete line, and verify the checksums if the first line has one.

        Args:
            path: the file; a missing one counts as empty.
            parse: makes an item of a line without its checksum; may raise ValueError, TypeError,
                OverflowError, KeyError or zlib.error.
            seed: predecessor of the first line's checksum; None: the first line isn't verified.
            remedy: advice at the end of an error message.
        Raises:
            ResultsError: a line isn't an item, has another schema version, or doesn't match its
                checksum.
        """
        if not path.exists():
            return cls(path=path, seed=seed or "")
        content = path.read_bytes()
        *lines, torn = content.split(b"\n")
        found = cls(
            path=path, torn_bytes=len(torn), seed=seed or "", _length=len(content) - len(torn)
        )
        previous, is_chained = seed, False
        for number, line in enumerate(lines, start=1):
            body = _parse_line(line, number, path, remedy)
            stored = body.pop("checksum", None)
            is_chained = is_chained or (number == 1 and stored is not None)
            if is_chained:
                if previous is not None and stored != line_checksum(previous, body):
                    raise half_read(
                        path,
                        f"line {number} doesn't fit its checksum: it or the line before was "
                        "edited, removed or damaged, or it belongs to another run",
                        remedy,
                    )
                previous = str(stored)
                found.checksums.append(previous)
            try:
                found.items.append(parse(body))
            except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
                what = f"line {number} isn't a record ({_first_fault(error)})"
                raise half_read(path, what, remedy) from error
        return found

    @classmethod
    def resume(
        cls, path: Path, parse: Callable[[dict[str, Any]], Item], *, seed: str, remedy: str
    ) -> Journal[Item]:
        """Read lines like `read`, all of which must have checksums, so that more can follow."""
        found = cls.read(path, parse, seed=seed, remedy=remedy)
        if len(found.checksums) != len(found.items):
            raise half_read(path, "line 1 doesn't fit its checksum: it has none", remedy)
        return found

    def open(self) -> None:
        """Open the file for `append`, and cut off an incomplete last line.

        Raises:
            ResultsError: the file isn't writable, or was removed since it was read.
        """
        is_new = not self.path.exists()
        if is_new and self.checksums:
            raise self._removed()
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            if self.torn_bytes:
                os.ftruncate(self._descriptor, self._length)
                os.fsync(self._descriptor)
            if is_new:
                sync_folder(self.path.parent)
        except OSError as error:
            raise unwritable(self.path, error) from error

    @property
    def is_open(self) -> bool:
        """Whether lines can be appended."""
        return self._descriptor >= 0

    def append(self, body: Mapping[str, Any]) -> None:
        """Write one line and fsync it.

        Raises:
            ResultsError: the disk is full, or the file was removed or replaced.
        """
        assert self.is_open, "open comes first"
        plain = {"schema_version": SCHEMA_VERSION, **to_strict(body)}
        checksum = line_checksum(self.checksums[-1] if self.checksums else self.seed, plain)
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
            raise unwritable(self.path, error) from error
        self._length += len(data)
        self.checksums.append(checksum)
        self.check_place()

    def check_place(self) -> None:
        """Raise ResultsError if the path no longer refers to the open file."""
        try:
            is_ours = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            is_ours = False
        if not is_ours:
            raise self._removed()

    def _removed(self) -> ResultsError:
        return ResultsError(
            f"{self.path} was removed or replaced while this run was writing it; put the folder "
            "back and give the same command again, or use another output folder"
        )

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self.is_open:
            os.close(self._descriptor)
            self._descriptor = -1


class Entry(NamedTuple):
    """One line of records.jsonl: one finished experiment."""

    key: str
    record: ExperimentRecord
    detail: ExperimentDetail


def parse_entry(body: Mapping[str, Any]) -> Entry:
    """Parse a line of records.jsonl of any version; null, JSON's NaN, is NaN again."""
    record, detail = dict(body["record"]), dict(body["detail"])
    for name in _FLOATS & {name for name, value in record.items() if value is None}:
        record[name] = float("nan")
    return Entry(
        str(body.get("key", "")),
        _RECORD.validate_python(record),
        _DETAIL.validate_python(_renamed(detail)),
    )


def parse_quality(body: Mapping[str, Any]) -> QualityRecord:
    """Parse a record of quality.jsonl of any version."""
    values = {"rule": {}, "document_key": body["document"], **body}
    return _QUALITY.validate_python(_renamed(values))


def to_values(item: ExperimentRecord | ExperimentDetail) -> dict[str, Any]:
    """Return field -> value without copies; `asdict` would copy every list."""
    return {f.name: getattr(item, f.name) for f in fields(item)}


_FLOATS: Final = {n for n, kind in get_type_hints(ExperimentRecord).items() if kind is float}
_RECORD: Final = TypeAdapter(ExperimentRecord)
_DETAIL: Final = TypeAdapter(ExperimentDetail)
_QUALITY: Final = TypeAdapter(QualityRecord)


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Rename the `expert_counts` of older versions, now the name of experts per token."""
    if "expert_counts" in values:
        values.setdefault("expert_load", values.pop("expert_counts"))
    return values


def _first_fault(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def _parse_line(line: bytes, number: int, path: Path, remedy: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise half_read(path, f"line {number} isn't a record ({error})", remedy) from error
    if not isinstance(entry, dict):
        raise half_read(path, f"line {number} isn't a record", remedy)
    version = entry.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ResultsError(
            f"line {number} of {path} has schema version {version}, this version of bh-routing "
            f"writes {SCHEMA_VERSION}; {remedy}"
        )
    return entry
