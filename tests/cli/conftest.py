"""The command line's tests run on the demo model, loaded once."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.experiments.conftest import loaded_demo

__all__ = ["loaded_demo"]


@pytest.fixture(autouse=True)
def heard_interrupts() -> Iterator[None]:
    """Hear SIGINT even where a shell started the tests in its background, which ignores it."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)
