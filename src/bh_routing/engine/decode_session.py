"""A rule at work on a few texts at once: one step, always in the same memory, run again and again.

On CUDA the step is one captured graph, replayed without waiting for what comes out; which experts
each layer kept stays on the device until the text is written.

Axes: B texts written side by side, S steps, P positions, L layers, K slots.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.kernels.decode_layout import Decoder
from bh_routing.kernels.decode_step import bind_step
from bh_routing.kernels.decode_torch import DecodeState
from bh_routing.kernels.router_twin import Router
from bh_routing.models.trace import DROPPED

STEPS_IN_A_BURST: Final = 16
"""Steps between two looks at the tokens: an end of text is noticed that late, and what was written
after it isn't counted."""


class Steps(NamedTuple):
    """What a session wrote."""

    token_SB: Tensor
    """int64, on the host."""
    kept_SLBK: Tensor
    """int16, on the session's device: kept expert of each slot, -1 where dropped."""
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
        self.state = state = DecodeState.empty(decoder, batch, num_positions)
        shape = (num_positions, len(decoder.layers), batch, num_slots)
        device = state.token_B.device
        self.kept_PLBK = torch.full(shape, DROPPED, dtype=torch.int16, device=device)
        self.token_PB = torch.zeros((num_positions, batch), dtype=torch.int64, device=device)
        self._step = bind_step(decoder, state, routers)
        self._advance = self._capture() if device.type == "cuda" else self.step

    @torch.inference_mode()
    def step(self) -> None:
        """Write one token a text, and what was kept for it; launches without waiting."""
        state = self.state
        slots = self._step()
        index_LBK = torch.stack([layer.top_k_index_TK for layer in slots])
        keep_LBK = torch.stack([layer.keep_TK for layer in slots])
        kept_LBK = torch.where(keep_LBK, index_LBK, DROPPED).to(torch.int16)
        self.kept_PLBK.index_copy_(0, state.position_1, kept_LBK.unsqueeze(0))
        self.token_PB.index_copy_(0, state.position_1, state.token_B.unsqueeze(0))
        state.position_1.add_(1)

    def _capture(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()  # kernels are compiled before the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

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
                self._advance()
                clock.tick()
            done = min(done + burst, num_steps)
            if end_ids and (ends := self._count_until_end(first, done, end_ids)) is not None:
                done = ends
                break
        end = first + done
        return Steps(self.token_PB[first:end].cpu(), self.kept_PLBK[first:end], clock.seconds(done))

    def _count_until_end(self, first: int, done: int, end_ids: Collection[int]) -> int | None:
        rows = self.token_PB[first : first + done].tolist()
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
