"""Write the files of a report atomically, never through a symbolic link."""

from __future__ import annotations

from pathlib import Path

from bh_routing.errors import ResultsError
from bh_routing.results.files import unwritable, write_atomically
from bh_routing.results.records import PLOTS


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, and create its folder if missing.

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
