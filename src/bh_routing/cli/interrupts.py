"""Let SIGTERM end a command as Ctrl-C does: by an exception that the work cleans up after."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import typer

EXIT_INTERRUPTED: Final = 130
EXIT_TERMINATED: Final = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived; whatever handles Ctrl-C handles this."""


@contextmanager
def interruptible(way_on: str) -> Iterator[None]:
    """Turn SIGTERM into `Terminated` inside the block, and say how to go on after either signal.

    Elsewhere than in the main thread SIGTERM stays as it is.

    Args:
        way_on: the end of the sentence that starts with "interrupted; ".
    Raises:
        typer.Exit: with the exit code of the signal.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGTERM, _raise) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt as interruption:
        print(f"bh-routing: interrupted; {way_on}", file=sys.stderr)
        is_term = isinstance(interruption, Terminated)
        raise typer.Exit(EXIT_TERMINATED if is_term else EXIT_INTERRUPTED) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, earlier)


def _raise(signum: int, frame: FrameType | None) -> None:
    raise Terminated
