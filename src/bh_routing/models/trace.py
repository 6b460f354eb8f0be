"""What a rule kept, recorded while the model runs and read once at the end.

Axes: F forward calls, T tokens, L layers, K candidate slots, E experts.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

DROPPED = -1


class ExpertTrace:
    """Which experts every token kept in every layer.

    While the model runs, only device tensors are collected: no host sync per token. The first
    reading copies them to the host once; a trace can't be read while more is coming, so read it
    after the last forward call, or call `clear` in between.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_experts = num_experts
        self._kept_index: list[list[Tensor]] = [[] for _ in range(num_layers)]

    def record(self, layer: int, top_k_index_TK: Tensor, keep_TK: Tensor) -> None:
        """Add one forward call of one layer."""
        kept = torch.where(keep_TK, top_k_index_TK, DROPPED)
        self._kept_index[layer].append(kept.to(torch.int16))

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
        return torch.stack([torch.cat(calls) for calls in self._kept_index], dim=1).cpu()

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
