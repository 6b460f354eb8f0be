"""Append JSON lines, each fsynced, each covered by a chain of checksums."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bh_routing.errors import ResultsError
from bh_routing.records import SCHEMA_VERSION, json_digest, line_checksum
from bh_routing.results.atomic import sync_folder, unwritable
from bh_routing.results.json_lines import JsonLines, read_json_lines
from bh_routing.results.strict_json import half_read, render_json_line, to_strict


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of keys."""
    return json_digest(to_strict(value))


def read_chained(path: Path, seed: str, remedy: str) -> JsonLines:
    """Read lines that must have checksums.

    Args:
        path: the file; a missing one is empty.
        seed: stands in place of the checksum before the first line.
        remedy: advice that ends an error's sentence.
    Raises:
        ResultsError: a line isn't JSON, is of another schema, or doesn't fit its checksum.
    """
    lines = read_json_lines(path, seed, remedy)
    if len(lines.checksums) != len(lines.objects):
        raise half_read(path, "line 1 doesn't fit its checksum: it has none", remedy)
    return lines


class ChainedWriter:
    """Append lines; each is on disk when `append` returns."""

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
        """Write one line, wait until the disk has it, and return its checksum.

        Raises:
            ResultsError: the disk is full, or the file was removed or replaced meanwhile.
        """
        plain = {"schema_version": SCHEMA_VERSION, **to_strict(body)}
        checksum = line_checksum(self._last_checksum, plain)
        # One write call: a signal handler can't come between two halves of a line.
        data = render_json_line({**plain, "checksum": checksum})
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
        self._last_checksum = checksum
        self.check_place()
        return checksum

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
