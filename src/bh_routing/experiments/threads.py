"""How many CPU threads a run gets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

SMALL_MODEL: Final = 100_000_000
"""Parameters below which a second thread costs more than it brings."""


def choose_threads(device: torch.device, num_parameters: int) -> int:
    """Choose the number of threads: one for a small model on a CPU, else torch's own choice.

    A small model is thousands of tiny operations a token, and each waits for the slowest thread:
    on two cores shared with other work, 50 tokens of the demo model took 20 s with two threads
    and 1.8 s with one, calibration 63 s and 10 s. A number that the user set (OMP_NUM_THREADS)
    stays.
    """
    is_small = device.type == "cpu" and num_parameters < SMALL_MODEL
    if is_small and "OMP_NUM_THREADS" not in os.environ:
        return 1
    return torch.get_num_threads()


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Use this many threads inside the block."""
    earlier = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(earlier)
