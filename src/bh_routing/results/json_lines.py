"""Append-only files of one JSON object per line, chained by checksums or not.

The checksum of a line covers the line and the checksum before it, so a line that was edited,
removed from the middle or copied from another file is found. A last line without its newline is
what a crash leaves while writing: it never finished, so it is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bh_routing.errors import ResultsError
from bh_routing.records import RUN_JSON, SCHEMA_VERSION, line_checksum
from bh_routing.results.strict_json import RESTORE, half_read


@dataclass(frozen=True, slots=True)
class JsonLines:
    """The whole lines of a file; the default is a file that doesn't exist yet."""

    objects: list[dict[str, Any]] = field(default_factory=list)
    """Without their checksums."""
    checksums: list[str] = field(default_factory=list)
    """One per object; empty if the lines have none."""
    valid_bytes: int = 0
    """Length of the file without a torn last line."""
    torn_bytes: int = 0
    """Length of a torn last line, 0 if there is none."""


def read_json_lines(path: Path, seed: str | None = None, remedy: str = RESTORE) -> JsonLines:
    """Read every whole line, and check the checksums if the first line has one.

    Args:
        path: the file; a missing one is empty.
        seed: stands in place of a checksum before the first line; None: the first isn't checked.
        remedy: advice that ends an error's sentence.
    Raises:
        ResultsError: a line isn't a JSON object, has another schema version, or doesn't fit its
            checksum.
    """
    if not path.exists():
        return JsonLines()
    content = path.read_bytes()
    *lines, torn = content.split(b"\n")
    found = JsonLines(valid_bytes=len(content) - len(torn), torn_bytes=len(torn))
    previous, is_chained = seed, False
    for number, line in enumerate(lines, start=1):
        entry = _parse(line, number, path, remedy)
        stored = entry.pop("checksum", None)
        is_chained = is_chained or (number == 1 and stored is not None)
        if is_chained:
            if previous is not None and stored != line_checksum(previous, entry):
                raise half_read(
                    path,
                    f"line {number} doesn't fit its checksum: it or the line before was edited, "
                    "removed or damaged, or it is of another run",
                    remedy,
                )
            previous = str(stored)
            found.checksums.append(previous)
        found.objects.append(entry)
    return found


def planned_keys(folder: Path) -> frozenset[str] | None:
    """Return the keys of the experiments that the folder's last run asked for; None if unknown.

    Names can't tell these from experiments of an earlier run: a name may have been redefined.
    """
    try:
        return frozenset(json.loads((folder / RUN_JSON).read_bytes())["plans"][-1])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _parse(line: bytes, number: int, path: Path, remedy: str) -> dict[str, Any]:
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
