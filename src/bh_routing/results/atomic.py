"""Write files so that a reader never sees half of one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from bh_routing.errors import ResultsError

TEMPORARY_SUFFIX: Final = ".tmp"


def write_atomically(path: Path, content: bytes) -> Path:
    """Put `content` at `path` through a temporary neighbour, fsync and rename.

    The folder must exist: made again, one that vanished would hold half of a run.

    Returns:
        The path.
    Raises:
        ResultsError: the disk is full, or the folder is gone or may not be written to.
    """
    try:
        _write_and_rename(path, content)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def unwritable(path: Path, error: OSError) -> ResultsError:
    """Build the error for a file that the system doesn't let us write."""
    return ResultsError(
        f"{path} can't be written ({error.strerror or error}); make room, give the right to write "
        "there, or choose another folder: what finished is kept, and the same command goes on "
        "from there"
    )


def _write_and_rename(path: Path, content: bytes) -> None:
    # A short piece of the name: with the suffix a long one would exceed the system's limit.
    neighbour = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")
    # Not tempfile: its mode 0600 would hide results from colleagues. open() applies the umask.
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
    """Make a rename or a new file in `folder` survive a power cut."""
    if os.name != "posix":
        return  # Windows can't open a folder, and renames are journaled there.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
