"""The terminal: logging that doesn't break progress bars, and SIGTERM as an exception."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import typer
from tqdm import tqdm

EXIT_INTERRUPTED: Final = 130
EXIT_TERMINATED: Final = 143


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM; handlers of Ctrl-C handle it too."""


@contextmanager
def interruptible(remedy: str) -> Iterator[None]:
    """Raise `Terminated` on SIGTERM inside the block; after either signal, say how to resume.

    Outside the main thread the SIGTERM handler is left unchanged.

    Args:
        remedy: rest of the sentence that starts with "interrupted; ".
    Raises:
        typer.Exit: with the exit code of the signal.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGTERM, _raise) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt as interruption:
        print(f"bh-routing: interrupted; {remedy}", file=sys.stderr)
        is_term = isinstance(interruption, Terminated)
        raise typer.Exit(EXIT_TERMINATED if is_term else EXIT_INTERRUPTED) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, earlier)


def _raise(signum: int, frame: FrameType | None) -> None:
    raise Terminated


log = logging.getLogger(__name__)

_SHOWN = ("bh_routing", "py.warnings")


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):
            # A closed terminal must not end a run that can still write its files.
            self.setLevel(logging.CRITICAL + 1)


@contextmanager
def console_log() -> Iterator[None]:
    """Show log records inside the block, after a message about the seconds that imports take."""
    handler = _Console(level=logging.INFO)
    for name in _SHOWN:
        logging.getLogger(name).addHandler(handler)
    package = logging.getLogger(_SHOWN[0])
    level = package.level
    package.setLevel(logging.INFO)
    if "torch" not in sys.modules:
        log.info("importing torch and transformers")
    try:
        yield
    finally:
        package.setLevel(level)
        for name in _SHOWN:
            logging.getLogger(name).removeHandler(handler)
