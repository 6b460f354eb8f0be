"""Write files so that a reader never sees half of one, and render the results table.

Floats are written by `repr`, so a value read back is the value measured.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from bh_routing.errors import ResultsError
from bh_routing.records import CSV_COLUMNS, ExperimentRecord

TEMPORARY_SUFFIX: Final = ".tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` through a temporary neighbour, fsync and rename.

    The folder must exist: made again, one that vanished would hold half of a run.

    Raises:
        ResultsError: the disk is full, or the folder is gone or may not be written to.
    """
    try:
        _write_and_rename(path, content)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ResultsError:
    """Build the error for a file that the system doesn't let us write."""
    return ResultsError(
        f"{path} can't be written ({error.strerror or error}); make room or give the right to "
        "write there, or choose another --output: what finished is kept, and the same command "
        "goes on from there"
    )


def _write_and_rename(path: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's 0600 would hide results from colleagues
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` survive a power cut."""
    if os.name != "posix":
        return  # Windows can't open a folder, and renames are journaled there.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain_json(value: Any) -> Any:
    """Replace what JSON doesn't know, at any depth: NaN and infinity by None, numpy's scalars."""
    if value is None or type(value) in (int, str, bool):  # most, so first
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, np.generic):
        return plain_json(value.item())
    return value


def render_json(value: Any) -> bytes:
    """Render as indented UTF-8 JSON with a final newline; NaN becomes null."""
    text = json.dumps(plain_json(value), ensure_ascii=False, indent=2, allow_nan=False)
    return f"{text}\n".encode()


def render_row(record: ExperimentRecord) -> str:
    """Render one record as a line of the CSV; a line may hold quoted newlines."""
    return _render([getattr(record, name) for name in CSV_COLUMNS])


def render_header() -> str:
    """Render the CSV's first line."""
    return _render(CSV_COLUMNS)


def _render(values: Iterable[Any]) -> str:
    buffer = io.StringIO()
    # The writer quotes only the line ends it was told of: name both, then end the line with one.
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return buffer.getvalue().removesuffix("\r\n") + "\n"
