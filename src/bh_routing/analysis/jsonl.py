"""Read append-only files of one JSON object a line, and say so when one isn't whole."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bh_routing.errors import ResultsError
from bh_routing.records import SCHEMA_VERSION, line_checksum

_log = logging.getLogger(__name__)


def read_lines(path: Path, seed: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object, without its checksum, of every whole line of this schema.

    A last line without its line end is being written, or was when the run was cut: it is skipped
    with a warning, since it never counted as finished. If the first line has a checksum, all must
    have one that fits their line and the checksum before.

    Args:
        path: the file.
        seed: what stands in place of a checksum before the first; None: the first isn't checked.
    Raises:
        ResultsError: a line isn't a JSON object, has another schema version, or doesn't fit its
            checksum.
    """
    previous = seed
    is_chained = False
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise half_read(path, str(error)) from error
    if lines[-1]:
        _log.warning("%s: the last line has no end; it is being written, and is skipped", path)
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise half_read(path, f"line {number} isn't a record ({error})") from error
        if not isinstance(entry, dict):
            raise half_read(path, f"line {number} isn't a record")
        version = entry.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise ResultsError(
                f"{path} has schema version {version}, this is {SCHEMA_VERSION}; read it with the "
                "version of bh-routing that wrote it, or run again into another folder"
            )
        stored = entry.pop("checksum", None)
        is_chained = stored is not None if number == 1 else is_chained
        if is_chained and previous is not None and stored != line_checksum(previous, entry):
            raise half_read(
                path,
                f"line {number} doesn't fit its checksum: it or the line before was edited or "
                "damaged",
            )
        previous = stored
        yield number, entry


def half_read(path: Path | None, what: str) -> ResultsError:
    """Build the error for a file that can't be read whole."""
    return ResultsError(
        f"{path or 'the journal'} can't be read whole: {what}; restore it, or run again with "
        "--no-resume, which moves the old run aside"
    )
