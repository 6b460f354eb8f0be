"""What a rule kept, recorded while the model runs and read once at the end.

Axes: F forward calls, T tokens, L layers, K candidate slots, E experts.
"""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

DROPPED = -1

_numbers: Final = itertools.count()
_traces: Final[WeakValueDictionary[int, ExpertTrace]] = WeakValueDictionary()


class ExpertTrace:
    """Which experts every token kept in every layer.

    While the model runs, only device tensors are collected: no host sync per token. The first
    reading copies them to the host once; a trace can't be read while more is coming, so read it
    after the last forward call, or call `clear` in between.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        self._number = next(_numbers)
        _traces[self._number] = self
        self._kept_index: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def record(self, layer: int, top_k_index_TK: Tensor, keep_TK: Tensor) -> Tensor:
        """Add one forward call of one layer.

        Returns:
            The index to go on with. In a compiled model recording is an operation of the graph,
            which runs in every call because the experts wait for what it returns.
        """
        kept_TK = torch.where(keep_TK, top_k_index_TK, DROPPED).to(torch.int16)
        if torch.compiler.is_compiling():
            index_TK: Tensor = _record(top_k_index_TK, kept_TK, self._number, layer)
            return index_TK
        self._kept_index[layer].append(kept_TK)
        return top_k_index_TK

    def clear(self) -> None:
        """Forget everything recorded so far."""
        for calls in self._kept_index:
            calls.clear()
        self.__dict__.pop("kept_index", None)

    @property
    def forward_tokens(self) -> list[int]:
        """Tokens of each forward call; in generation the first is the prompt."""
        return [call.shape[0] for call in self._kept_index[0]]

    @cached_property
    def kept_index(self) -> Tensor:
        """Kept expert of each slot, -1 where dropped: int16 on the host, (tokens, layers, K)."""
        if not self.forward_tokens:
            return torch.empty((0, len(self._kept_index), 1), dtype=torch.int16)
        # Layers of a model that is spread over GPUs record where they are.
        device = self._kept_index[0][0].device
        layers = [torch.cat(calls).to(device) for calls in self._kept_index]
        return torch.stack(layers, dim=1).cpu()

    @property
    def expert_counts(self) -> Tensor:
        """Number of experts each token kept: int64 on the host, (tokens, layers)."""
        return (self.kept_index != DROPPED).sum(-1)

    @property
    def utilization(self) -> Tensor:
        """Number of tokens that kept each expert: int64 on the host, (layers, experts)."""
        return count_experts(self.kept_index, self.num_experts)


def count_experts(kept_index_TLK: Tensor, num_experts: int) -> Tensor:
    """Count how often each expert was kept in each layer: int64, (layers, experts)."""
    num_layers = kept_index_TLK.shape[1]
    layers_L = torch.arange(num_layers)[None, :, None]
    flat = (kept_index_TLK.long() + layers_L * num_experts)[kept_index_TLK != DROPPED]
    return torch.bincount(flat, minlength=num_layers * num_experts).view(num_layers, num_experts)


# A CUDA graph would replay without us: inductor leaves such an operation out of it.
@torch.library.custom_op("bh_routing::record", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _record(index_TK: Tensor, kept_TK: Tensor, number: int, layer: int) -> Tensor:
    trace = _traces.get(number)
    if trace is not None:
        trace._kept_index[layer].append(kept_TK.clone())
    return index_TK.clone()


@_record.register_fake
def _(index_TK: Tensor, kept_TK: Tensor, number: int, layer: int) -> Tensor:
    return torch.empty_like(index_TK)
