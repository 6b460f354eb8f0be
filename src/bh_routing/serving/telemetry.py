"""Experts per token and distinct experts per decode step of a running server, from samples.

About every second one forward pass is counted, so the cost doesn't depend on the server's speed; a
random number is skipped first, since the first after a pause reads a prompt. Counters are sums over
tokens (or decode steps) and layers; quotients of their increases are means.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from prometheus_client import Counter, Gauge
from torch import Tensor

log = logging.getLogger("vllm.bh_routing")

PERIOD_SEC: Final = 1.0
MOST_SKIPPED: Final = 32
"""Passes, at most, between the end of a period and the pass that is counted."""
LOG_PERIOD_SEC: Final = 60.0


class ExpertCounts(NamedTuple):
    """Sums over the layers of one forward pass, or of several."""

    tokens: int = 0
    """Rows without padding, once per layer."""
    experts: int = 0
    """Their kept slots."""
    steps: int = 0
    """Forward passes with decode rows, once per layer."""
    distinct_experts: int = 0
    """Distinct experts of the decode rows."""

    def plus(self, other: ExpertCounts) -> ExpertCounts:
        """Return the sum of both."""
        return ExpertCounts(*(a + b for a, b in zip(self, other, strict=True)))


def count_experts(index_LTK: NDArray[np.integer], is_decode_T: NDArray[np.bool_]) -> ExpertCounts:
    """Count a forward pass's experts: a dropped slot repeats the id of a kept one.

    Args:
        index_LTK: expert ids of every layer, without padding.
        is_decode_T: False in prefill.
    Example:
        >>> count_experts(np.array([[[3, 1, 3], [1, 2, 0]]]), np.array([True, True]))
        ExpertCounts(tokens=2, experts=5, steps=1, distinct_experts=4)
    """
    ordered = np.sort(index_LTK, axis=-1)
    num_layers, num_rows, _ = index_LTK.shape
    kept = int((np.diff(ordered, axis=-1) != 0).sum()) + num_layers * num_rows
    steps = num_layers * int(is_decode_T.any())
    distinct = sum(len(np.unique(layer[is_decode_T])) for layer in index_LTK) if steps else 0
    return ExpertCounts(num_layers * num_rows, kept, steps, distinct)


@cache
def _metrics() -> tuple[dict[str, Counter], Gauge]:
    """Register the metrics, which a process can do once."""
    counters = {
        name: Counter(f"bh_routing_sampled_{name}", f"{text}, over sampled forward passes.")
        for name, text in (
            ("tokens", "Tokens times layers"),
            ("experts", "Experts that tokens kept, summed over layers"),
            ("steps", "Decode steps times layers"),
            ("distinct_experts", "Distinct experts of decode steps, summed over layers"),
        )
    }
    info = Gauge("bh_routing_info", "The served rule.", ["rule"], multiprocess_mode="livemax")
    return counters, info


class _Pending(NamedTuple):
    index_LTK: Tensor
    is_decode_T: NDArray[np.bool_]
    event: torch.cuda.Event | None


class Telemetry:
    """Counters of one server process.

    Args:
        record_LTK: the expert ids of the latest forward pass, int32, filled by the layers.
        rule: the rule's description, a label.
        clock: time in seconds.
    """

    def __init__(
        self, record_LTK: Tensor, rule: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._record_LTK = record_LTK
        self._clock = clock
        self._rule = rule
        self._latest: NDArray[np.bool_] | None = None
        self._pending: _Pending | None = None
        self._next_sec = self._next_log_sec = clock()
        self._to_skip = 0
        self._unlogged = ExpertCounts()
        self._counters, info = _metrics()
        info.labels(rule).set(1)

    @property
    def is_due(self) -> bool:
        """Whether the next forward pass is to be counted."""
        return self._has_waited and self._to_skip == 0

    @property
    def _has_waited(self) -> bool:
        return self._clock() >= self._next_sec and self._pending is None

    def begin(self, is_decode_T: NDArray[np.bool_] | None) -> None:
        """Begin a forward pass; counts the one before, if it was announced.

        Args:
            is_decode_T: rows without padding; None if this pass isn't to be counted.
        """
        self._collect()
        if is_decode_T is None and self._has_waited:
            self._to_skip = max(0, self._to_skip - 1)
        if self._latest is not None and self._pending is None:
            self._copy(self._latest)
        self._latest = is_decode_T

    def _copy(self, is_decode_T: NDArray[np.bool_]) -> None:
        self._next_sec = self._clock() + PERIOD_SEC
        self._to_skip = random.randrange(MOST_SKIPPED + 1)
        index_LTK, event = self._record_LTK[:, : len(is_decode_T)], None
        if index_LTK.is_cuda:
            host = torch.empty(index_LTK.shape, dtype=index_LTK.dtype, pin_memory=True)
            host.copy_(index_LTK, non_blocking=True)
            index_LTK, event = host, torch.cuda.Event()
            event.record()
        self._pending = _Pending(index_LTK, is_decode_T, event)
        self._collect()

    def _collect(self) -> None:
        if self._pending is None or not (
            self._pending.event is None or self._pending.event.query()
        ):
            return
        counts = count_experts(self._pending.index_LTK.numpy(), self._pending.is_decode_T)
        self._pending = None
        for name, value in counts._asdict().items():
            self._counters[name].inc(value)
        self._unlogged = self._unlogged.plus(counts)
        if self._clock() >= self._next_log_sec:
            self._log()

    def _log(self) -> None:
        counts, self._unlogged = self._unlogged, ExpertCounts()
        self._next_log_sec = self._clock() + LOG_PERIOD_SEC
        steps = ""
        if counts.steps:
            distinct = counts.distinct_experts / counts.steps
            steps = f", {distinct:.2f} distinct experts per decode step and layer"
        mean = counts.experts / max(counts.tokens, 1)
        log.info("rule %s: %.2f experts per token%s (sampled)", self._rule, mean, steps)
