"""How many CPU threads a model gets: as many as make its own operations fastest here and now."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch

LARGE_MODEL: Final = 500_000_000
"""Parameters from which every core pays, and timing would take longer than it gains."""
BATCH_TOKENS: Final = 256
TIMED_SEC: Final = 0.4
MOST_TIMED: Final = 9
GAIN: Final = 0.95
"""A larger number of threads must take less than this fraction of the smaller one's time."""


class Threads(NamedTuple):
    """Numbers of threads."""

    decode: int
    """For one token after the other."""
    batch: int
    """For many tokens at once: calibration and scoring."""


def choose_threads(model: Any) -> Threads:
    """Choose numbers of threads by timing the model's forward pass on a CPU.

    Each operation waits for its slowest thread, so that the best number depends on the model's size
    and on what else the machine does. A number that the user set (OMP_NUM_THREADS) stays, and
    torch's own is taken for a large model and on other devices.
    """
    most = torch.get_num_threads()
    is_small = sum(parameter.numel() for parameter in model.parameters()) < LARGE_MODEL
    if model.device.type != "cpu" or not is_small or "OMP_NUM_THREADS" in os.environ:
        return Threads(most, most)
    return Threads(*(_fastest(model, num_tokens, most) for num_tokens in (1, BATCH_TOKENS)))


@torch.inference_mode()
def _fastest(model: Any, num_tokens: int, most: int) -> int:
    token_1T = torch.arange(1, num_tokens + 1).unsqueeze(0)
    best, best_sec = 1, _seconds(model, token_1T, 1)
    number = 2
    while number <= most:
        seconds = _seconds(model, token_1T, number)
        if seconds > GAIN * best_sec:
            break
        best, best_sec = number, seconds
        number = most if number < most < 2 * number else 2 * number
    return best


def _seconds(model: Any, token_1T: torch.Tensor, number: int) -> float:
    """Median time of a forward pass with some threads; the first pass isn't counted."""
    seconds: list[float] = []
    with torch_threads(number):
        model(input_ids=token_1T, use_cache=False, logits_to_keep=1)
        while len(seconds) < MOST_TIMED and sum(seconds) < TIMED_SEC:
            start = time.perf_counter()
            model(input_ids=token_1T, use_cache=False, logits_to_keep=1)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Use this many threads inside the block."""
    earlier = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(earlier)
