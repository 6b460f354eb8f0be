"""Atomic file writes, and one writer and one reader per format."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from bh_routing.errors import ResultsError
from bh_routing.results.records import PLOTS

TEMPORARY_SUFFIX: Final = ".tmp"


def write_atomically(path: Path, content: bytes) -> Path:
    """Write `content` to a temporary file next to `path`, fsync it and rename it to `path`.

    The folder must exist: recreating a deleted folder would leave a partial run in it.

    Returns:
        The path.
    Raises:
        ResultsError: the disk is full, or the folder is missing or not writable.
    """
    try:
        _write_and_rename(path, content)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file of a report atomically, and create its folder if missing.

    Raises:
        ResultsError: the plots folder is a symbolic link to another place, or the file can't be
            written.
    """
    if path.parent.name == PLOTS and path.parent.is_symlink():
        raise ResultsError(
            f"{path.parent} is a symbolic link, and bh-routing writes no plot outside its folder; "
            "remove the link"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    return write_atomically(path, content)


def write_text(path: Path, content: str) -> Path:
    """Write UTF-8 text the same way; unencodable characters become question marks."""
    return write_bytes(path, content.encode("utf-8", errors="replace"))


def unwritable(path: Path, error: OSError) -> ResultsError:
    """Build the error for a file that can't be written."""
    return ResultsError(
        f"{path} can't be written ({error.strerror or error}); make room, give the right to write "
        "there, or choose another folder: finished work is kept, and the same command continues "
        "from there"
    )


def _write_and_rename(path: Path, content: bytes) -> None:
    # Only the start of the name: a long name plus the suffix would exceed the system's limit.
    neighbour = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    # Not tempfile: its mode 0600 would hide results from other users. open() applies the umask.
    descriptor = os.open(neighbour, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    except BaseException:
        neighbour.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Fsync `folder`, so that a rename or a new file in it survives a power failure."""
    if os.name != "posix":
        return  # Windows can't open a folder, and renames are journaled there.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


RESTORE = "put the file back as it was, or use another output folder"


def to_strict(value: Any) -> Any:
    """Convert `value` to plain JSON data; NaN and infinity become None.

    Args:
        value: mappings, sequences, dataclasses, paths, numpy arrays and scalars, nested freely.
    Returns:
        Data that `json.dumps(..., allow_nan=False)` accepts.
    Raises:
        TypeError: a nested value has no JSON form.
    Example:
        >>> to_strict({"p": float("nan"), "n": np.int64(3)})
        {'p': None, 'n': 3}
    """
    if value is None or isinstance(value, (str, int)):  # most values, so first; bool is an int
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.generic, np.ndarray)):
        return to_strict(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): to_strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_strict(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not asdict: it would copy nested values before they are converted.
        return {f.name: to_strict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


def render_json(value: Any) -> bytes:
    """Render as indented JSON with a final newline."""
    return _encode(json.dumps(to_strict(value), ensure_ascii=False, indent=2, allow_nan=False))


def render_json_line(value: Any) -> bytes:
    """Render as one line of JSON with its newline."""
    return _encode(
        json.dumps(to_strict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    )


def render_json_lines(values: Iterable[Any]) -> bytes:
    """Render as JSON lines."""
    return b"".join(map(render_json_line, values))


def _encode(text: str) -> bytes:
    # A lone surrogate, as in a path that isn't UTF-8, becomes \udcXX, a valid JSON escape.
    return f"{text}\n".encode(errors="backslashreplace")


def read_json_object(path: Path, remedy: str = RESTORE) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        remedy: advice at the end of the error message.
    Raises:
        ResultsError: the file can't be read, or isn't a complete JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise half_read(path, error.strerror or str(error), remedy) from error
    except (ValueError, RecursionError) as error:
        raise half_read(path, f"it isn't JSON ({error})", remedy) from error
    if not isinstance(value, dict):
        raise half_read(path, f"it holds a {type(value).__name__}, not a JSON object", remedy)
    return value


def find_json_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object like `read_json_object`; None if the file doesn't exist."""
    return read_json_object(path) if path.is_file() else None


def half_read(path: Path | None, what: str, remedy: str = RESTORE) -> ResultsError:
    """Build the error for a file that can't be read completely."""
    return ResultsError(f"{path or 'the journal'} can't be read whole: {what}; {remedy}")


_FORMULA: Final = re.compile(r"'*[\s\ufeff]*[=+\-@|%＝＋－＠]")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_WRITTEN_CONTROL: Final = re.compile(r"\\x(?:0[0-8bcef]|1[0-9a-f]|7f|[89][0-9a-f])")
_ESCAPE: Final = re.compile(r"\\(\\|x[0-9a-f]{2})")


def render_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> bytes:
    """Render a header and rows.

    Args:
        rows: column -> value, as for `render_csv_row`.
        columns: names of the header, in order; None: the keys of the first row.
    """
    rows = list(rows)
    names = list(rows[0] if columns is None and rows else columns or ())
    lines = [render_csv_row(names), *(render_csv_row(row[name] for name in names) for row in rows)]
    return "".join(lines).encode(errors="backslashreplace")


def render_csv_row(values: Iterable[Any]) -> str:
    """Render one row with its line ending; a row may hold quoted line endings.

    Numbers are written by `repr`, None and NaN as an empty cell.

    Example:
        >>> render_csv_row([0.5, math.nan, "=1+1", "red\\x1b[31m", "a, b"])
        '0.5,,\\'=1+1,red\\\\x1b[31m,"a, b"\\n'
    """
    buffer = io.StringIO()
    cells = map(_written, values)
    # The writer quotes only the line endings it is given: pass both, then end the line with one.
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read every row as column -> text.

    Args:
        path: a UTF-8 file written by `render_csv`.
        columns: names that the header must have.
    Raises:
        ResultsError: the file can't be read, lacks a column, or has an incomplete row.
    """
    try:
        content = path.read_bytes().decode("utf-8")
        # strict: an open quote at the end of the file means truncation, not the end of a text.
        header, *rows = list(csv.reader(io.StringIO(content, newline=""), strict=True)) or [[]]
    except OSError as error:
        raise half_read(path, error.strerror or str(error)) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise half_read(path, str(error)) from error
    if not content:
        raise half_read(path, "it is empty")
    if not content.endswith("\n"):
        raise half_read(path, "its last row has no line end")
    if missing := [name for name in columns if name not in header]:
        raise half_read(path, f"it lacks the columns {', '.join(missing)}")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise half_read(path, f"row {number} has {len(row)} of {len(header)} cells")
    return [dict(zip(header, map(_read, row), strict=True)) for row in rows]


def _written(value: Any) -> Any:
    if not isinstance(value, str):
        return None if isinstance(value, float) and math.isnan(value) else value
    text = value
    if _CONTROL.search(text) or _WRITTEN_CONTROL.search(text):
        doubled = text.replace("\\", "\\\\")
        text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", doubled)
    return f"'{text}" if _FORMULA.match(text) else text


def _read(cell: str) -> str:
    text = cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
    if _WRITTEN_CONTROL.search(text):
        text = _ESCAPE.sub(lambda e: "\\" if e[1] == "\\" else chr(int(e[1][1:], 16)), text)
    return text


def planned_keys(run: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the keys of the experiments that run.json plans last; None if it has no plan.

    Names can't distinguish these from an earlier run's experiments: a name may be redefined.
    """
    try:
        return frozenset(run["plans"][-1])
    except (LookupError, TypeError):
        return None
