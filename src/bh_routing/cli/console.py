"""Show the log on stderr, without tearing a progress bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

log = logging.getLogger(__name__)

_SHOWN = ("bh_routing", "py.warnings")


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):
            # A closed terminal must not end a run that still writes its files.
            self.setLevel(logging.CRITICAL + 1)


@contextmanager
def console_log() -> Iterator[None]:
    """Show what the package logs inside the block, and first why it is silent for seconds."""
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
