"""experiment_log.txt: an append-only copy of the console's log.

Records are buffered until the results folder is accepted: a rejected folder stays unchanged.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from bh_routing.results.files import unwritable

SOURCES: Final = ("bh_routing", "py.warnings", "transformers")
"""Loggers shown on the console."""
FILE_ONLY: Final[dict[str, Any]] = {"file_only": True}
"""`extra` of a record that the console shows in another form, such as a progress bar."""


class RunLog:
    """Buffer log records until a file is given, then write them to it; a context manager."""

    def __init__(self) -> None:
        self._handler = _HeldBack()
        self._level = logging.NOTSET

    def write_to(self, path: Path) -> None:
        """Append buffered records to `path`, and from now on each record at once."""
        self._handler.write_to(path)

    def __enter__(self) -> RunLog:
        logger = logging.getLogger(SOURCES[0])
        self._level = logger.level
        logger.setLevel(logging.INFO)
        for name in SOURCES:
            logging.getLogger(name).addHandler(self._handler)
        logging.captureWarnings(True)
        return self

    def __exit__(self, *_: object) -> None:
        logging.captureWarnings(False)
        for name in SOURCES:
            logging.getLogger(name).removeHandler(self._handler)
        logging.getLogger(SOURCES[0]).setLevel(self._level)
        self._handler.close()


class _HeldBack(logging.Handler):
    """A handler that buffers records until it has a file."""

    def __init__(self) -> None:
        super().__init__()
        self._held: list[logging.LogRecord] = []
        self._descriptor: int | None = None
        self.setFormatter(
            logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        )

    def write_to(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise unwritable(path, error) from error
        held, self._held = self._held, []
        for record in held:
            self.emit(record)

    def emit(self, record: logging.LogRecord) -> None:
        if self._descriptor is None:
            self._held.append(record)
            return
        # A full disk must neither stop the run nor print a traceback.
        with suppress(OSError):
            os.write(self._descriptor, f"{self.format(record)}\n".encode(errors="replace"))

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()
