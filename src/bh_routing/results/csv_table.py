"""One CSV for a program, a spreadsheet and a terminal: texts stay texts, and read back the same.

A text that a spreadsheet would run as a formula gets an apostrophe in front. In a text with control
characters each of them is written as `\\x1b`, and each backslash twice. `read_csv` takes both back.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bh_routing.results.strict_json import RESTORE, half_read

_FORMULA: Final = re.compile(r"'*[\s\ufeff]*[=+\-@|%＝＋－＠]")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_WRITTEN_CONTROL: Final = re.compile(r"\\x(?:0[0-8bcef]|1[0-9a-f]|7f|[89][0-9a-f])")
_ESCAPE: Final = re.compile(r"\\(\\|x[0-9a-f]{2})")


def render_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> bytes:
    """Render a header and rows.

    Args:
        rows: column -> value; numbers are written by `repr`, None as nothing.
        columns: names of the header, in order; None: those of the first row.
    """
    rows = list(rows)
    names = list(rows[0] if columns is None and rows else columns or ())
    lines = [render_csv_row(names), *(render_csv_row([row[n] for n in names]) for row in rows)]
    return "".join(lines).encode(errors="backslashreplace")


def render_csv_row(values: Iterable[Any]) -> str:
    """Render one row with its line end; a row may hold quoted line ends.

    Example:
        >>> render_csv_row([0.5, "=1+1", "red\\x1b[31m", "a, b"])
        '0.5,\\'=1+1,red\\\\x1b[31m,"a, b"\\n'
    """
    buffer = io.StringIO()
    cells = [_written(value) if isinstance(value, str) else value for value in values]
    # The writer quotes only the line ends it was told of: name both, then end the line with one.
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n") + "\n"


def read_csv(path: Path, columns: Sequence[str], remedy: str = RESTORE) -> list[dict[str, str]]:
    """Read every row as the texts that were written.

    Args:
        path: a UTF-8 file that `render_csv` made.
        columns: names that the header must have.
        remedy: advice that ends an error's sentence.
    Raises:
        ResultsError: the file can't be read, lacks a column, or a row is cut short.
    """
    try:
        content = path.read_bytes().decode("utf-8")
        # strict: an open quote at the end of the file is a cut, not the end of a text.
        header, *rows = list(csv.reader(io.StringIO(content, newline=""), strict=True)) or [[]]
    except OSError as error:
        raise half_read(path, error.strerror or str(error), remedy) from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise half_read(path, str(error), remedy) from error
    if not content:
        raise half_read(path, "it is empty", remedy)
    if not content.endswith("\n"):
        raise half_read(path, "its last row has no line end", remedy)
    if missing := [name for name in columns if name not in header]:
        raise half_read(path, f"it lacks the columns {', '.join(missing)}", remedy)
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise half_read(path, f"row {number} has {len(row)} of {len(header)} cells", remedy)
    return [dict(zip(header, map(_read, row), strict=True)) for row in rows]


def _written(text: str) -> str:
    if _CONTROL.search(text) or _WRITTEN_CONTROL.search(text):
        doubled = text.replace("\\", "\\\\")
        text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", doubled)
    return f"'{text}" if _FORMULA.match(text) else text


def _read(cell: str) -> str:
    text = cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
    if _WRITTEN_CONTROL.search(text):
        text = _ESCAPE.sub(lambda e: "\\" if e[1] == "\\" else chr(int(e[1][1:], 16)), text)
    return text
