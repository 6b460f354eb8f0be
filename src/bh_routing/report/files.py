"""Read what a run left behind, and write files that are never seen half done."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from bh_routing.errors import ResultsError
from bh_routing.records import PLOTS, RUN_JSON


def write_bytes(path: Path, content: bytes) -> Path:
    """Write through a temporary neighbour, fsync and rename.

    Raises:
        ResultsError: the folder's plots are a symbolic link to somewhere else.
    """
    if path.parent.name == PLOTS and path.parent.is_symlink():
        raise ResultsError(
            f"{path.parent} is a symbolic link, and bh-routing writes no plot outside its folder; "
            "remove the link"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files that only the owner may read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def write_text(path: Path, content: str) -> Path:
    """Write UTF-8 the same way; what UTF-8 can't hold becomes a question mark."""
    return write_bytes(path, content.encode("utf-8", errors="replace"))


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json of a results folder; empty if it isn't there or can't be read as JSON."""
    return read_json(folder / RUN_JSON)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or isn't one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
