"""An append-only file of JSON lines, each fsynced, each covered by a chain of checksums.

A checksum covers its line and the checksum before it, so a line that was edited, removed from
the middle or copied from another file is found. A last line without its newline is what a crash
leaves while writing; what it was to hold never finished, so it is dropped.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bh_routing.errors import ResultsError
from bh_routing.experiments.files import plain_json, sync_folder, unwritable
from bh_routing.records import SCHEMA_VERSION, json_digest, line_checksum

WAYS_OUT = "start over with --no-resume, or choose another --output"


@dataclass(frozen=True, slots=True)
class ChainedLine:
    """One line that fits its checksum."""

    body: dict[str, Any]
    checksum: str


@dataclass(frozen=True, slots=True)
class ChainedContent:
    """What is on disk; the default is a file that doesn't exist yet."""

    lines: list[ChainedLine] = field(default_factory=list)
    valid_bytes: int = 0
    """Length of the file without a torn last line."""
    torn_bytes: int = 0
    """Length of a torn last line, 0 if there is none."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of keys."""
    return json_digest(plain_json(value))


def read_chained(path: Path, seed: str) -> ChainedContent:
    """Read all lines and check the chain.

    Args:
        path: the file; a missing one is empty.
        seed: what the first checksum builds on.
    Raises:
        ResultsError: a line isn't JSON, is of another schema, or doesn't fit its checksum.
    """
    if not path.exists():
        return ChainedContent()
    content = path.read_bytes()
    *lines, torn = content.split(b"\n")
    chained: list[ChainedLine] = []
    for number, line in enumerate(lines, start=1):
        previous = chained[-1].checksum if chained else seed
        chained.append(_parse(line, previous, where=f"line {number} of {path}"))
    return ChainedContent(chained, len(content) - len(torn), len(torn))


class ChainedWriter:
    """Append lines; each is on disk when `append` returns."""

    def __init__(self, path: Path, content: ChainedContent, seed: str) -> None:
        is_new = not path.exists()
        self._path = path
        self._last_checksum = content.lines[-1].checksum if content.lines else seed
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

    def append(self, body: Mapping[str, Any]) -> ChainedLine:
        """Write one line and wait until the disk has it.

        Raises:
            ResultsError: the disk is full, or the file was removed or replaced meanwhile.
        """
        plain: dict[str, Any] = plain_json({"schema_version": SCHEMA_VERSION, **body})
        line = ChainedLine(plain, line_checksum(self._last_checksum, plain))
        text = json.dumps(
            {**plain, "checksum": line.checksum},
            ensure_ascii=False,
            separators=(",", ":"),
            allow_nan=False,
        )
        # One write call: a signal handler can't come between two halves of a line.
        data = f"{text}\n".encode()
        try:
            if os.write(self._descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)
        except OSError as error:
            # Half a line in front of a later one would damage the whole file.
            with suppress(OSError):  # one that stays torn is dropped when it is read
                os.ftruncate(self._descriptor, self._length)
            raise unwritable(self._path, error) from error
        self._length += len(data)
        self._last_checksum = line.checksum
        self.check_place()
        return line

    def check_place(self) -> None:
        """Raise ResultsError if the file's name no longer leads to the file being written."""
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
        """Let go of the file."""
        os.close(self._descriptor)


def _parse(line: bytes, previous: str, where: str) -> ChainedLine:
    try:
        body = json.loads(line)
        stored = body.pop("checksum")
        version = body["schema_version"]
        expected = line_checksum(previous, body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResultsError(f"{where} can't be read; {WAYS_OUT}") from error
    if version != SCHEMA_VERSION:
        raise ResultsError(
            f"{where} has schema version {version}, this version of bh-routing writes "
            f"{SCHEMA_VERSION}; {WAYS_OUT}"
        )
    if stored != expected:
        raise ResultsError(
            f"{where} doesn't fit its checksum: it or a line before it was edited or removed, "
            f"or it is of another run; {WAYS_OUT}"
        )
    return ChainedLine(body, stored)
