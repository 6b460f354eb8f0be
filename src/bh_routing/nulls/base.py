"""Base class of null distributions: a score, its reference sample, and the meaning of alpha.

Axes: T tokens, E experts, K slots, H hidden, N reference scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from bh_routing.errors import CalibrationError

AlphaMeaning = Literal["error rate", "tuning parameter", "nothing"]


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceTable:
    """The sorted reference sample of one layer: an empirical null distribution."""

    sorted_scores_N: Tensor
    """float32, ascending along the last axis, finite; shape (N,), or (E, N) with one distribution
    per expert."""

    @classmethod
    def from_scores(cls, scores: Tensor) -> ReferenceTable:
        """Sort scores of any shape into a table.

        Raises:
            CalibrationError: there is no score, or a score is NaN or infinite.
        """
        scores_N = scores.detach().to(torch.float32).flatten()
        num_bad = scores_N.numel() - int(scores_N.isfinite().sum())
        if scores_N.numel() == 0 or num_bad:
            raise CalibrationError(
                f"a reference table needs at least one score, all finite; got {scores_N.numel()} "
                f"with {num_bad} NaN or infinite; calibrate again on text the model can read"
            )
        return cls(scores_N.sort().values)

    @classmethod
    def by_expert(cls, scores_TE: Tensor) -> ReferenceTable:
        """Sort each expert's scores into a distribution of its own, all of the same size.

        The expert with the fewest scores sets the size; the others keep as many, the first ones.
        With different sizes, p-values beyond every reference would be ordered by size.

        Args:
            scores_TE: finite, or NaN where a token is no reference for an expert; the order of
                rows must be independent of the scores.
        Raises:
            CalibrationError: an expert has no score.
        """
        is_reference_ET = ~scores_TE.isnan().T
        count_ET = is_reference_ET.cumsum(dim=-1)
        size = int(count_ET[:, -1].min())
        if size == 0:
            expert = int(count_ET[:, -1].argmin())
            raise CalibrationError(
                f"expert {expert} is among the model's top-k of every calibration token, so it "
                "has no reference of its own; calibrate on more text, or choose null='background'"
            )
        is_taken_ET = is_reference_ET & (count_ET <= size)
        scores_EN = scores_TE.to(torch.float32).T[is_taken_ET].reshape(-1, size)
        return cls(scores_EN.sort(dim=-1).values)

    def __len__(self) -> int:
        return self.sorted_scores_N.shape[-1]

    def p_values(self, scores: Tensor) -> Tensor:
        """Return (1 + #{reference >= s}) / (N + 1) as float64, in the shape of `scores`.

        Raises:
            CalibrationError: there is one distribution per expert, and the length of the scores'
                last axis isn't the number of experts.
        """
        # No copy if a rule moved its table when it was bound.
        reference = self.sorted_scores_N.to(scores.device)
        if reference.ndim == 1:
            below = torch.searchsorted(reference, scores.contiguous(), side="left")
        else:
            num_experts = len(reference)
            if scores.ndim == 0 or scores.shape[-1] != num_experts:
                raise CalibrationError(
                    f"the reference has {num_experts} experts, scores have shape "
                    f"{tuple(scores.shape)}; its last axis must be those experts"
                )
            scores_ET = scores.reshape(-1, num_experts).T.contiguous()
            below = torch.searchsorted(reference, scores_ET, side="left").T.reshape(scores.shape)
        return (1 + len(self) - below).to(torch.float64) / (len(self) + 1)

    def to(self, device: torch.device) -> ReferenceTable:
        """Return the table with its scores on `device`."""
        return ReferenceTable(self.sorted_scores_N.to(device))


class RouterPass(NamedTuple):
    """Inputs and outputs of one router of the unmodified model on calibration text."""

    router_logits_TE: Tensor
    """float32."""
    top_k_index_TK: Tensor
    hidden_states_TH: Tensor | None = None
    """The router's input; None if there is no router, as in noise."""
    gate_EH: Tensor | None = None
    """The router's weight, one row per expert."""
    bias_E: Tensor | None = None
    """The bias of the router's logits; None if it has none."""


class Null(ABC):
    """Base class of null distributions. Stateless: calibration data is passed in as a table."""

    name: ClassVar[str]
    alpha_is: ClassVar[AlphaMeaning]
    meaning: ClassVar[str]
    """The meaning of alpha under this null distribution, in one sentence for reports."""
    needs_table: ClassVar[bool]
    needs_gate: ClassVar[bool] = False
    """Whether its reference sample is computed from the router's input and weight."""
    by_expert: ClassVar[bool] = False
    """Whether each expert has a reference distribution of its own. p-values then decrease with the
    score of one expert, not across experts: no critical value holds for all, and their order may
    differ from that of the logits."""

    @abstractmethod
    def score(self, router_logits_TE: Tensor, temperature: float = 1.0) -> Tensor:
        """Score each expert; float32, increasing in the logit within a row."""

    @abstractmethod
    def p_from_score(self, scores: Tensor, table: ReferenceTable | None = None) -> Tensor:
        """Convert scores to p-values, float64, same shape; non-increasing in the score.

        Raises:
            CalibrationError: the null needs a table and none was given.
        """

    def descending_scores(
        self,
        router_logits_TE: Tensor,
        temperature: float = 1.0,
        sorted_logits_TE: Tensor | None = None,
    ) -> Tensor:
        """Return the rows of `score` sorted, largest first; bitwise equal, for the hot path.

        A subclass whose score starts from a sorted row overrides this, sorts only once, and not at
        all if `sorted_logits_TE` holds the logits in float32, largest first.
        """
        return self.score(router_logits_TE, temperature).sort(dim=-1, descending=True).values

    def reference(self, router_logits_TE: Tensor, top_k_index_TK: Tensor) -> Tensor:
        """Return the reference scores among these logits, shape (N,).

        If `by_expert`, the shape is (T, E), with NaN where a token is no reference for an expert.
        """
        raise AssertionError(f"null {self.name!r} needs no reference")  # our own bug

    def reference_of(self, seen: RouterPass) -> Tensor:
        """Return `reference` of a router pass; overridden where other inputs are needed."""
        return self.reference(seen.router_logits_TE, seen.top_k_index_TK)

    def table_of(self, seen: RouterPass) -> ReferenceTable:
        """Build a table from one router pass."""
        make = ReferenceTable.by_expert if self.by_expert else ReferenceTable.from_scores
        return make(self.reference_of(seen))

    def require_table(self, table: ReferenceTable | None) -> ReferenceTable:
        """Return the table; raise CalibrationError if it is None."""
        if table is None:
            raise CalibrationError(
                f"null {self.name!r} needs a calibration and none was given; run: "
                f"bh_routing.calibrate(model, tokenizer, texts, nulls=[{self.name!r}]), or choose "
                "null='gaussian', which needs none"
            )
        return table
