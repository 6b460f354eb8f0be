"""The kept experts of each token, recorded while the model runs.

Axes: B sequences, S positions, T tokens, L layers, K candidate slots, E experts.
"""

from __future__ import annotations

import itertools
from typing import Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

DROPPED = -1
_PADDING: Final = -2

_numbers: Final = itertools.count()
_traces: Final[WeakValueDictionary[int, ExpertTrace]] = WeakValueDictionary()


class ExpertTrace:
    """Kept experts of every token in every layer.

    Positions masked out by a forward call's attention mask are padding and not part of the trace.
    Layers recomputed by gradient checkpointing count once. Sequences that `generate` keeps feeding
    after their end-of-text token are still run, and therefore count.

    While the model runs, only device tensors are collected: no host sync per token. Reading copies
    all complete forward calls to the host.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        self._number = next(_numbers)
        _traces[self._number] = self
        self._calls: list[list[Tensor]] = [[] for _ in range(num_layers)]
        self._steps: list[bool] = []
        self._is_step = False
        self._real_BS: Tensor | None = None
        self._read: tuple[int, Tensor] | None = None

    @classmethod
    def of_sequence(cls, kept_TLK: Tensor, num_prompt_tokens: int, num_experts: int) -> ExpertTrace:
        """Return the trace of a prompt in one forward call, and of decode steps of one token each.

        Args:
            kept_TLK: kept expert of each slot, -1 where dropped: int16, on the host.
            num_prompt_tokens: tokens of the prompt, at least 1.
            num_experts: experts per layer.
        """
        trace = cls(kept_TLK.shape[1], num_experts)
        steps = [1] * (len(kept_TLK) - num_prompt_tokens)
        calls = kept_TLK.split([num_prompt_tokens, *steps])
        trace._calls = [
            [call_TLK[:, layer] for call_TLK in calls] for layer in range(kept_TLK.shape[1])
        ]
        trace._steps = [num_prompt_tokens == 1, *(True for _ in steps)]
        trace._read = len(calls), kept_TLK
        return trace

    def begin(self, real_BS: Tensor | None, *, is_step: bool = False) -> None:
        """Begin a forward call.

        Args:
            real_BS: False at padding, None without padding.
            is_step: whether the call has one position per sequence, as in decoding.
        """
        self._real_BS = real_BS
        self._is_step = is_step
        if not torch.compiler.is_compiling():
            # A failed call has recorded some layers but not the others.
            complete = self._num_complete
            for calls in self._calls:
                del calls[complete:]
            del self._steps[complete:]

    def _record(self, layer: int, top_k_index_TK: Tensor, keep_TK: Tensor) -> Tensor:
        """Add one forward call of one layer.

        Returns:
            The index to pass to the experts. In a compiled model recording is an operation of the
            graph, which runs in every call because the experts depend on its output.
        """
        kept_TK = torch.where(keep_TK, top_k_index_TK, DROPPED).to(torch.int16)
        real_BS = self._real_BS
        if real_BS is not None and real_BS.numel() == len(kept_TK):
            real_T1 = real_BS.reshape(-1, 1).to(kept_TK.device)
            kept_TK = torch.where(real_T1, kept_TK, _PADDING)
        if torch.compiler.is_compiling():
            index_TK: Tensor = _record_call(
                top_k_index_TK, kept_TK, self._number, layer, self._is_step
            )
            return index_TK
        self._add(layer, kept_TK, self._is_step)
        return top_k_index_TK

    def _add(self, layer: int, kept_TK: Tensor, is_step: bool) -> None:
        # In a backward pass a layer is recomputed, not run anew.
        if torch._C._current_graph_task_id() == -1:
            self._calls[layer].append(kept_TK)
            if layer == 0:
                self._steps.append(is_step)

    def clear(self) -> None:
        """Delete all records."""
        for calls in self._calls:
            calls.clear()
        self._steps.clear()
        self._read = None

    @property
    def _num_complete(self) -> int:
        return min(len(calls) for calls in self._calls)

    @property
    def forward_tokens(self) -> list[int]:
        """Number of tokens per forward call; in generation the first call is the prompt."""
        complete = self._calls[0][: self._num_complete]
        return [int((call[:, 0] != _PADDING).sum()) for call in complete]

    @property
    def kept_index(self) -> Tensor:
        """Kept expert of each slot, -1 where dropped: int16 on the host, (tokens, layers, K)."""
        complete = self._num_complete
        if self._read is None or self._read[0] != complete:
            self._read = (complete, self._copy_to_host(complete))
        return self._read[1]

    def _copy_to_host(self, complete: int) -> Tensor:
        if not complete:
            return torch.empty((0, len(self._calls), 1), dtype=torch.int16)
        # In a model spread over GPUs, layers record on their own devices.
        device = self._calls[0][0].device
        layers = [torch.cat(calls[:complete]).to(device) for calls in self._calls]
        kept_TLK = torch.stack(layers, dim=1).cpu()
        return kept_TLK[kept_TLK[:, 0, 0] != _PADDING]

    @property
    def expert_counts(self) -> Tensor:
        """Number of kept experts per token: int64 on the host, (tokens, layers)."""
        return (self.kept_index != DROPPED).sum(-1)

    @property
    def distinct_experts(self) -> Tensor:
        """Number of distinct experts that each decode step kept: int64, (steps, layers), on host.

        Decode steps are the forward calls with one position per sequence, prefill isn't one. Pads
        don't count, and a step of pads alone has no row.
        """
        tokens = self.forward_tokens
        is_step = [step and n > 0 for step, n in zip(self._steps, tokens, strict=False)]
        number = torch.tensor(is_step, dtype=torch.int64).cumsum(0) - 1
        number[~torch.tensor(is_step, dtype=torch.bool)] = -1
        step_T = number.repeat_interleave(torch.tensor(tokens, dtype=torch.int64))
        kept_TLK = self.kept_index[step_T >= 0]
        return count_distinct(step_T[step_T >= 0], kept_TLK, self.num_experts)

    @property
    def utilization(self) -> Tensor:
        """Number of tokens that kept each expert: int64 on the host, (layers, experts)."""
        return count_experts(self.kept_index, self.num_experts)


def count_distinct(step_T: Tensor, kept_index_TLK: Tensor, num_experts: int) -> Tensor:
    """Count the distinct experts of each step and layer: int64, (steps, layers).

    Args:
        step_T: the step of each token, from 0.
        kept_index_TLK: the tokens' kept experts, -1 where dropped.
        num_experts: experts per layer.
    """
    num_steps = int(step_T.max()) + 1 if len(step_T) else 0
    num_layers = kept_index_TLK.shape[1]
    # One column more, which dropped slots fall into.
    device = kept_index_TLK.device
    shape = (num_steps, num_layers, num_experts + 1)
    is_read_SLE = torch.zeros(shape, dtype=torch.bool, device=device)
    expert_TLK = torch.where(kept_index_TLK == DROPPED, num_experts, kept_index_TLK.long())
    layer_L = torch.arange(num_layers, device=device)
    is_read_SLE[step_T[:, None, None], layer_L[:, None], expert_TLK] = True
    return is_read_SLE[..., :num_experts].sum(-1)


def count_experts(kept_index_TLK: Tensor, num_experts: int) -> Tensor:
    """Count the tokens that kept each expert in each layer: int64, (layers, experts)."""
    num_layers = kept_index_TLK.shape[1]
    layers_L = torch.arange(num_layers)[None, :, None]
    flat = (kept_index_TLK.long() + layers_L * num_experts)[kept_index_TLK != DROPPED]
    return torch.bincount(flat, minlength=num_layers * num_experts).view(num_layers, num_experts)


# A CUDA graph's replay would skip this Python code: the tag keeps it out of inductor's graphs.
@torch.library.custom_op("bh_routing::record", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _record_call(
    index_TK: Tensor, kept_TK: Tensor, number: int, layer: int, is_step: bool
) -> Tensor:
    trace = _traces.get(number)
    if trace is not None:
        trace._add(layer, kept_TK.clone(), is_step)
    return index_TK.clone()


@_record_call.register_fake
def _(index_TK: Tensor, kept_TK: Tensor, number: int, layer: int, is_step: bool) -> Tensor:
    return torch.empty_like(index_TK)
