"""A uniform sample of a stream of scores in fixed memory: what a reference table is made from."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.limits import DRAWS_ON_FIRST_LINE


def reservoir_capacity(num_experts: int, smallest_alpha: float = 0.005) -> int:
    """Return how many scores a table needs to decide at this alpha.

    Example:
        >>> reservoir_capacity(64, smallest_alpha=0.01)
        128000
    """
    return ceil(DRAWS_ON_FIRST_LINE * num_experts / smallest_alpha)


class Reservoir:
    """Keeps `capacity` scores of a stream, every subset of that size being equally likely.

    Each score draws a key and the smallest keys stay, so the sample depends on the seed and the
    stream but not on how the stream was cut into chunks. Memory never exceeds twice the capacity
    and one chunk.

    Source: Efraimidis & Spirakis (2006), with equal weights.
    """

    def __init__(self, capacity: int, seed: int | Sequence[int]) -> None:
        """Start empty; give each (null, layer) its own seed, such as (seed, null, layer)."""
        if capacity < 1:
            raise InputError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.num_seen = 0
        self._random = np.random.default_rng(seed)
        self._keys = np.empty(0, dtype=np.float64)
        self._scores = np.empty(0, dtype=np.float32)
        self._highest_kept_key = np.inf

    def __len__(self) -> int:
        """Number of scores in the sample."""
        return min(self.num_seen, self.capacity)

    def add(self, scores: Tensor) -> None:
        """Offer scores of any shape; they are copied to the CPU once."""
        offered = scores.detach().to("cpu", torch.float32).flatten().numpy()
        keys = self._random.random(offered.size)
        self.num_seen += offered.size
        is_candidate = keys < self._highest_kept_key
        self._keys = np.concatenate([self._keys, keys[is_candidate]])
        self._scores = np.concatenate([self._scores, offered[is_candidate]])
        # Selecting costs a pass over what is held, so it waits until that has doubled.
        if self._keys.size >= 2 * self.capacity:
            self._shrink()

    def table(self) -> ReferenceTable:
        """Return the sample as a reference table.

        Raises:
            CalibrationError: nothing was offered, or a score was NaN or infinite.
        """
        self._shrink()
        return ReferenceTable.from_scores(torch.from_numpy(self._scores.copy()))

    def _shrink(self) -> None:
        if self._keys.size <= self.capacity:
            return
        kept = np.argpartition(self._keys, self.capacity - 1)[: self.capacity]
        self._keys, self._scores = self._keys[kept], self._scores[kept]
        self._highest_kept_key = float(self._keys.max())
