"""The negative control that treats router probabilities as if they were p-values."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bh_routing.nulls.base import AlphaMeaning, Null, ReferenceTable


class Softmax(Null):
    """p = 1 - softmax(logit / T): no reference distribution at all.

    The probabilities of a token sum to 1, so its p-values sum to E - 1. At most one of them can
    be on or below BH's line while alpha < 1 - 1/E, and it is only where the largest probability
    is at least 1 - alpha / E. Usually nothing is rejected, and min_k decides.
    """

    name: ClassVar[str] = "softmax"
    alpha_is: ClassVar[AlphaMeaning] = "nothing"
    meaning: ClassVar[str] = (
        "nothing: 1 - probability is no p-value, and at most one expert can be rejected at any "
        "usual alpha; a negative control"
    )
    needs_table: ClassVar[bool] = False

    def score(self, router_logits_TE: Tensor, temperature: float = 1.0) -> Tensor:
        """Return softmax(logit / T) in float32."""
        return (router_logits_TE.to(torch.float32) / temperature).softmax(dim=-1)

    def p_from_score(self, scores: Tensor, table: ReferenceTable | None = None) -> Tensor:
        """Return 1 - score, no less than 0; a table is ignored."""
        return (1.0 - scores.to(torch.float64)).clamp(0.0, 1.0)
