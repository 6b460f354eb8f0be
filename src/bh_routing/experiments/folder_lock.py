"""Locks that allow one writer per folder, and a check against links out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from bh_routing.errors import ResultsError
from bh_routing.experiments.stored_run import OWN_NAMES
from bh_routing.results.files import unwritable
from bh_routing.results.records import CHECKPOINT

LOCK: Final = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Create a folder and lock it inside the block; for commands other than `run`.

    Raises:
        ResultsError: another process writes to the folder, or it isn't writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise in_use(folder) from None
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def refuse_links(folder: Path) -> None:
    """Raise ResultsError if a file that we write in the folder is a symbolic link."""
    for name in (*OWN_NAMES, LOCK, CHECKPOINT):
        path = folder / name
        if path.is_symlink():
            raise ResultsError(
                f"{path} is a symbolic link, and bh-routing writes nothing outside its output "
                "folder; remove the link, or choose another --output"
            )


def in_use(folder: Path) -> ResultsError:
    """Return the error for a folder that another process has locked."""
    return ResultsError(
        f"another run is writing to {folder}; wait until it ends, or choose another --output"
    )
