"""What a null is: a score, a reference distribution for it, and what its alpha then means.

Axes: T tokens, E experts, N reference scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

AlphaMeaning = Literal["error rate", "knob", "nothing"]


@dataclass(frozen=True, slots=True)
class ReferenceTable:
    """The scores of one layer's background, sorted: an empirical null distribution."""

    sorted_scores_N: Tensor
    """float32, ascending, shape (N,)."""

    def p_values(self, scores: Tensor) -> Tensor:
        """Return (1 + #{reference >= s}) / (N + 1) as float64, in the shape of `scores`."""
        reference_N = self.sorted_scores_N
        below = torch.searchsorted(reference_N, scores.contiguous(), side="left")
        size = reference_N.numel()
        return (1 + size - below).to(torch.float64) / (size + 1)


class Null(ABC):
    """One row of the table of nulls. Stateless: calibration data comes in as a table."""

    name: ClassVar[str]
    alpha_is: ClassVar[AlphaMeaning]
    meaning: ClassVar[str]
    """What alpha is under this null, in one sentence for reports."""
    needs_table: ClassVar[bool]

    @abstractmethod
    def score(self, router_logits_TE: Tensor, temperature: float = 1.0) -> Tensor:
        """Score each expert, larger is stronger; float32, monotone in the logit within a row."""

    @abstractmethod
    def p_from_score(self, scores: Tensor, table: ReferenceTable | None = None) -> Tensor:
        """Turn scores into p-values, float64, same shape; non-increasing in the score.

        Raises:
            CalibrationError: the null needs a table and none was given.
        """

    def reference(self, router_logits_TE: Tensor, top_k_index_TK: Tensor) -> Tensor:
        """The scores among these logits that belong to this null's background, shape (N,).

        Raises:
            NotFittedError: never called for a null that needs no table.
        """
        raise AssertionError(f"null {self.name!r} needs no reference")  # our own bug
