"""A rule at work on a few texts at once: one step, always in the same memory, run again and again.

On CUDA the step is one captured graph, replayed without waiting for what comes out; which experts
each layer kept stays on the device until the text is written.

Axes: B texts written side by side, S steps, P positions, L layers, K slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.engine.timing import captured
from bh_routing.kernels.decode_layout import Decoder
from bh_routing.kernels.decode_step import bind_step
from bh_routing.kernels.decode_torch import DecodeState
from bh_routing.kernels.router_twin import Router

STEPS_IN_A_BURST: Final = 16
"""Steps between two looks at the tokens: an end of text is noticed that late, and what was written
after it isn't counted."""


class Steps(NamedTuple):
    """What a session wrote."""

    token_SB: Tensor
    """int64, on the host."""
    kept_SLBK: Tensor
    """int16, on the session's device: kept expert of each slot, -1 where dropped."""
    has_nan: bool
    """Whether a token was chosen from logits that hold NaN or infinity."""
    seconds: float


class Session:
    """One rule at work on B texts of up to P positions; its memory and its graph are reused.

    Args:
        decoder: the model's weights.
        routers: the rule, bound to each layer.
        num_slots: what each router proposes.
        batch: B.
        num_positions: P.
    """

    def __init__(
        self,
        decoder: Decoder,
        routers: Sequence[Router],
        *,
        num_slots: int,
        batch: int,
        num_positions: int,
    ) -> None:
        self.state = DecodeState.empty(
            decoder, batch=batch, num_positions=num_positions, num_slots=num_slots
        )
        step = bind_step(decoder, self.state, routers)
        self.advance: Callable[[], None] = step
        """Write one token a text; launches without waiting."""
        if self.state.token_B.is_cuda:
            with torch.inference_mode():
                self.advance = captured(step)

    def start(self, cache: Any, token_B: Tensor) -> int:
        """Take over transformers' cache of a prompt and its first tokens; return their position."""
        length = int(cache.layers[0].keys.shape[2])
        for number, layer in enumerate(cache.layers):
            self.state.keys[number, :, :, :length] = layer.keys
            self.state.values[number, :, :, :length] = layer.values
        self.state.token_B.copy_(token_B)
        self.state.position_1.fill_(length)
        self.state.logits_BV.zero_()
        return length

    def run(self, first: int, num_steps: int, end_ids: Collection[int]) -> Steps:
        """Decode from position `first` on, to the first end token of all texts at most.

        Only after a burst of steps does the host wait for the device.
        """
        clock = _Clock(self.state.token_B.device)
        burst = STEPS_IN_A_BURST if self.state.token_B.is_cuda else 1
        done = 0
        while done < num_steps:
            for _ in range(min(burst, num_steps - done)):
                self.advance()
                clock.tick()
            done = min(done + burst, num_steps)
            if end_ids and (ends := self._count_until_end(first, done, end_ids)) is not None:
                done = ends
                break
        end = first + done
        return Steps(
            self.state.token_PB[first:end].cpu(),
            self.state.kept_PLBK[first:end],
            not bool((self.state.top_PB[first:end] < torch.inf).all()),
            clock.seconds(done),
        )

    def _count_until_end(self, first: int, done: int, end_ids: Collection[int]) -> int | None:
        rows = self.state.token_PB[first : first + done].tolist()
        return next((n for n, row in enumerate(rows, 1) if all(t in end_ids for t in row)), None)


class _Clock:
    """Time until each step was done, by the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self._ticks: list[Any] = []
        self._is_cuda = device.type == "cuda"
        self.tick()

    def tick(self) -> None:
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ticks.append(event)
        else:
            self._ticks.append(time.perf_counter())

    def seconds(self, ticks: int) -> float:
        first, last = self._ticks[0], self._ticks[ticks]
        if not self._is_cuda:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000
