"""Time contenders in interleaved rounds, in random order, after a warm-up round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch

FILLER_VALUES: Final = 2**28
MULTIPLIED_SIZE: Final = {"cuda": 8_192, "cpu": 1_024}
COPIED_BYTES: Final = {"cuda": 2**31, "cpu": 2**27}


class Timing(NamedTuple):
    """Seconds of repeated runs."""

    median_sec: float
    low_sec: float
    """Minimum."""
    high_sec: float
    """Maximum."""
    rounds: int


def time_interleaved(
    runs: Mapping[str, Callable[[], float]], rounds: int, seed: int = 0
) -> dict[str, Timing]:
    """Run every contender once per round, in a new random order, and summarise its seconds.

    A machine that slows down slows all of them alike. An additional first round warms up.

    Args:
        runs: each returns the seconds that it took; see `stopwatch`.
        rounds: number of timed rounds, at least 1.
        seed: seed of the orders.
    """
    generator = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name in generator.sample(list(runs), len(runs)):
            taken = runs[name]()
            if round_:
                seconds[name].append(taken)
    return {
        name: Timing(statistics.median(values), min(values), max(values), rounds)
        for name, values in seconds.items()
    }


def stopwatch(call: Callable[[], Any], device: torch.device, calls: int = 1) -> Callable[[], float]:
    """Return a function that makes `calls` calls and returns the mean seconds per call.

    On CUDA it measures by events, the first after work that keeps the GPU busy until the host has
    launched the first call.
    """
    if device.type != "cuda":

        def by_clock() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls

        return by_clock
    # Only read: the cache then holds no dirty lines to write back during the calls.
    filler = torch.zeros(FILLER_VALUES, dtype=torch.bfloat16, device=device)

    def by_events() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        filler.sum()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / calls

    return by_events


@dataclass(frozen=True, slots=True)
class _Replay:
    """A captured call; it is kept because the graph uses the memory that it holds."""

    call: Callable[[], Any]
    graph: torch.cuda.CUDAGraph

    def __call__(self) -> None:
        self.graph.replay()


def captured(call: Callable[[], Any], pool: Any = None) -> Callable[[], None]:
    """Capture a call in a CUDA graph and return its replay.

    Args:
        call: launches kernels; no results may be read that it allocates.
        pool: handle of the memory pool of graphs that never overlap; None: its own.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # kernels are compiled before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return _Replay(call, graph)


def copied_bytes_per_second(device: torch.device) -> float:
    """Measure memory bandwidth by a copy, bytes read plus written: the memory-bound roof."""
    source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = stopwatch(lambda: target.copy_(source), device)
    return 2 * source.numel() / time_interleaved({"copy": copy}, rounds=7)["copy"].median_sec


def multiplied_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Measure a large matrix product in operations per second: the arithmetic-bound roof."""
    size = MULTIPLIED_SIZE[device.type]
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    multiply = stopwatch(lambda: left @ right, device)
    return 2 * size**3 / time_interleaved({"multiply": multiply}, rounds=7)["multiply"].median_sec
