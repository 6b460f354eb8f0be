"""One rule's decoding in fixed memory: prefill and decode steps as CUDA graphs on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.engine.timing import captured
from bh_routing.kernels.decode import DecodeState, bind_prompts, bind_step
from bh_routing.kernels.decode_layout import Decoder
from bh_routing.models.trace import ExpertTrace
from bh_routing.rules.router import Router

STEPS_IN_A_BURST: Final = 16
"""Steps between host syncs: end-of-text tokens are detected only then, and later tokens are
discarded."""
MOST_CAPTURED_TOKENS: Final = 4096
"""Tokens of prompts, with padding, up to which the prefill is one graph; above, the device takes
longer than the host's launches."""
MOST_CHEAP_TOKENS: Final = 512
"""Tokens up to which padding to a power of two costs next to nothing; above, there are 16 lengths
per power of two, and a graph is captured when its length returns."""
FEWEST_CAPTURED_POSITIONS: Final = 16


class Steps(NamedTuple):
    """Output of a session's decode steps."""

    token_SB: Tensor
    """int64, on the host; the first row comes from the prefill."""
    num_tokens_B: list[int]
    """Generated tokens per sequence, including an end-of-text token."""
    kept_SLBK: Tensor
    """int16, on the session's device: kept expert of each slot, -1 where dropped."""
    has_nan: bool
    """Whether a token was chosen from logits that hold NaN or infinity."""
    seconds: float
    """Of the decode steps."""


class Session:
    """Buffers and graphs for one rule, batch size and maximum length, reused between runs.

    Args:
        decoder: the model's weights.
        routers: the rule, bound to each layer.
        num_slots: slots that each router proposes.
        batch: maximum number of sequences.
        num_positions: maximum number of positions per sequence.
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
        self._is_cuda = self.state.token_B.is_cuda
        # Graphs of one session never overlap, so they share memory.
        self._pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        step = bind_step(decoder, self.state, routers)
        self.advance: Callable[[], None] = step
        """Generate one token per sequence; on CUDA it launches without a host sync."""
        if self._is_cuda:
            with torch.inference_mode():
                self.advance = captured(step)
        self._read = bind_prompts(decoder, self.state, routers)
        self._length_B = torch.zeros_like(self.state.position_B)
        self._captured: dict[int, tuple[Tensor, Callable[[], None]]] = {}
        self._read_before: set[int] = set()
        self._lengths: list[int] = []
        self._end_ids: Collection[int] = ()

    def prepare(self, longest: int) -> None:
        """Capture the prefill of prompts up to this length, if a graph pays."""
        padded = self._padded(longest)
        num_tokens = len(self._length_B) * padded
        is_worthwhile = num_tokens <= MOST_CHEAP_TOKENS or padded in self._read_before
        if (
            self._is_cuda
            and is_worthwhile
            and num_tokens <= MOST_CAPTURED_TOKENS
            and padded not in self._captured
        ):
            token_BP = self.state.token_B.new_zeros(len(self._length_B), padded)
            with torch.inference_mode():
                # An earlier prompt may be longer than this graph's positions.
                self._length_B.zero_()
                graph = captured(lambda: self._read(token_BP, self._length_B), self._pool)
            self._captured[padded] = token_BP, graph

    def _padded(self, longest: int) -> int:
        # A single position is a decode step, which rules on steps decide as one.
        if longest == 1:
            return longest
        power = 1 << (longest - 1).bit_length()
        is_cheap = len(self._length_B) * power <= MOST_CHEAP_TOKENS
        unit = max(FEWEST_CAPTURED_POSITIONS, power if is_cheap else power // 16)
        return min(-(-longest // unit) * unit, self.state.keys.shape[3])

    def start(self, prompts: Sequence[Sequence[int]], end_ids: Collection[int] = ()) -> None:
        """Read prompts, and generate each one's first token.

        Args:
            prompts: token ids, at most as many prompts as the session has sequences.
            end_ids: tokens that end a sequence.
        """
        self._mark_ends(end_ids)
        self._lengths = [len(prompt) for prompt in prompts]
        longest = max(self._lengths)
        self.prepare(longest)
        padded = self._padded(longest)
        is_captured = padded in self._captured
        width = padded if is_captured else longest
        token_BP = torch.zeros(len(self._length_B), width, dtype=torch.int64)
        length_B = torch.zeros(len(self._length_B), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            token_BP[row, : len(prompt)] = torch.as_tensor(prompt)
            length_B[row] = len(prompt)
        self._length_B.copy_(length_B)
        if is_captured:
            buffer_BP, graph = self._captured[padded]
            buffer_BP.copy_(token_BP)
            graph()
        else:
            self._read(token_BP.to(self._length_B.device), self._length_B)
            self._read_before.add(padded)

    def _mark_ends(self, end_ids: Collection[int]) -> None:
        if set(end_ids) != set(self._end_ids):
            num_tokens = len(self.state.is_end_V)
            is_end = [token in end_ids for token in range(num_tokens)]
            self.state.is_end_V.copy_(torch.tensor(is_end))
        self._end_ids = end_ids

    def run(self, num_steps: int) -> Steps:
        """Decode until all sequences have ended.

        The host waits for the device only after each burst of steps.
        """
        clock = _Clock(self.state.token_B.device)
        burst = STEPS_IN_A_BURST if self._is_cuda else 1
        done = 0
        while done < num_steps and not (self._end_ids and not self.state.is_live_B.any()):
            for _ in range(min(burst, num_steps - done)):
                self.advance()
                clock.tick()
            done = min(done + burst, num_steps)
        return self._collect(done, clock)

    def _collect(self, done: int, clock: _Clock) -> Steps:
        state, batch = self.state, len(self._lengths)
        step_S1 = torch.arange(done + 1, device=state.row_B.device)[:, None]
        place_SB = self._length_B[:batch] - 1 + step_S1
        token_SB = state.token_PB[place_SB, state.row_B[:batch]].cpu()
        tokens_BS = token_SB.T.tolist()
        num_tokens_B = [
            next((n for n, token in enumerate(tokens, 1) if token in self._end_ids), done + 1)
            for tokens in tokens_BS
        ]
        num_steps = max(num_tokens_B) - 1
        top_SB = state.top_PB[place_SB, state.row_B[:batch]].cpu()
        is_counted_SB = torch.arange(done + 1)[:, None] < torch.tensor(num_tokens_B)
        kept_PBLK = state.kept_PLBK.transpose(1, 2)
        return Steps(
            token_SB[: num_steps + 1],
            num_tokens_B,
            kept_PBLK[place_SB[1 : num_steps + 1], state.row_B[:batch]].transpose(1, 2),
            not bool((top_SB[is_counted_SB] < torch.inf).all()),
            clock.seconds(num_steps),
        )

    def traces(self, steps: Steps, num_experts: int) -> list[ExpertTrace]:
        """Return the kept experts of each sequence: its prompt and its decode steps."""
        ends = [n + count - 1 for n, count in zip(self._lengths, steps.num_tokens_B, strict=True)]
        kept_PLBK = self.state.kept_PLBK[: max(ends)].cpu()
        return [
            # Cloned: the next prompts overwrite the state.
            ExpertTrace.of_sequence(kept_PLBK[:end, :, row].clone(), length, num_experts)
            for row, (length, end) in enumerate(zip(self._lengths, ends, strict=True))
        ]


class _Clock:
    """Time until the end of each step, by CUDA events on a GPU."""

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
