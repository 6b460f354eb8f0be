"""Reservoir sampling: a uniform sample of a stream of scores in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.cut_offs import BY_EXPERT_ALPHA, DRAWS_ON_FIRST_LINE


def reservoir_capacity(num_experts: int, smallest_alpha: float = 0.005) -> int:
    """Return the number of scores that a table needs to resolve this alpha.

    Example:
        >>> reservoir_capacity(64, smallest_alpha=0.01)
        128000
    """
    return ceil(DRAWS_ON_FIRST_LINE * num_experts / smallest_alpha)


def row_capacity(num_experts: int) -> int:
    """Return the number of tokens whose rows are kept if each expert has its own table.

    It is twice the size of a table at `BY_EXPERT_ALPHA`: enough for an expert that is in the
    model's top-k for half of all tokens.

    Example:
        >>> row_capacity(64)
        51200
    """
    return 2 * reservoir_capacity(num_experts, BY_EXPERT_ALPHA)


class Reservoir:
    """A sample of `capacity` scores of a stream; every subset of that size is equally likely.

    With `row_length` it keeps whole rows of scores instead, such as those of one token.

    Each score draws a key and the smallest keys stay, so the sample depends on the seed and the
    stream but not on its division into chunks. Memory never exceeds twice the capacity plus one
    chunk.

    Source: Efraimidis & Spirakis (2006), with equal weights.
    """

    def __init__(
        self, capacity: int, seed: int | Sequence[int], row_length: int | None = None
    ) -> None:
        """Start empty; use a different seed per (null, layer), such as (seed, null, layer)."""
        if capacity < 1:
            raise InputError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self.num_seen = 0
        self._random = np.random.default_rng(seed)
        self._keys = np.empty(0, dtype=np.float64)
        self._row = () if row_length is None else (row_length,)
        self._scores = np.empty((0, *self._row), dtype=np.float32)
        self._highest_kept_key = np.inf

    def __len__(self) -> int:
        """Number of scores, or rows, in the sample."""
        return min(self.num_seen, self.capacity)

    def add(self, scores: Tensor) -> None:
        """Add scores to the stream, of any shape unless kept by row; one copy to the CPU."""
        offered = scores.detach().to("cpu", torch.float32).numpy().reshape(-1, *self._row)
        keys = self._random.random(len(offered))
        self.num_seen += len(offered)
        is_candidate = keys < self._highest_kept_key
        self._keys = np.concatenate([self._keys, keys[is_candidate]])
        self._scores = np.concatenate([self._scores, offered[is_candidate]])
        # Selecting passes over all stored scores, so it waits until they have doubled.
        if self._keys.size >= 2 * self.capacity:
            self._shrink()

    def table(self) -> ReferenceTable:
        """Return the sample as a reference table.

        Raises:
            CalibrationError: no score was added, or a score was NaN or infinite.
        """
        self._shrink()
        return ReferenceTable.from_scores(torch.from_numpy(self._scores.copy()))

    def rows(self) -> Tensor:
        """Return the sample in a random order, which doesn't depend on chunks either."""
        self._shrink()
        return torch.from_numpy(self._scores[self._keys.argsort()])

    def _shrink(self) -> None:
        if self._keys.size <= self.capacity:
            return
        kept = np.argpartition(self._keys, self.capacity - 1)[: self.capacity]
        self._keys, self._scores = self._keys[kept], self._scores[kept]
        self._highest_kept_key = float(self._keys.max())
