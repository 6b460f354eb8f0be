"""Higher Criticism: select experts by the excess of small p-values over chance.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch

from bh_routing.errors import InputError
from bh_routing.multitest.step_up import criticism_reaches
from bh_routing.nulls.catalog import get_null
from bh_routing.nulls.cut_offs import cut_offs_where
from bh_routing.rules.base import (
    SIGNED_LOG,
    Knob,
    LayerContext,
    MixingRule,
    check_at_most_experts,
    check_count,
)
from bh_routing.rules.plan import Plan


@dataclass(frozen=True)
class HigherCriticism(MixingRule):
    """Keep the k best experts, k the largest rank up to max_k whose criticism is >= threshold.

    The criticism of rank i is sqrt(E) (i/E - p_(i)) / sqrt(p_(i) (1 - p_(i))): the standardised
    excess of small p-values over chance. A token without such a rank keeps one expert.

    Source: Donoho & Jin (2004), equation (1.5), for the statistic. They test for the presence of
    any signal; counting up to the last crossing is ours, so that thresholds cover every mean.
    Example:
        >>> HigherCriticism(2.0, max_k=10).num_candidates(model_top_k=8)
        10
    """

    method: ClassVar[str] = "higher_criticism"
    knob: ClassVar[Knob | None] = Knob("threshold", SIGNED_LOG, keeps_more=False)

    threshold: float
    """Smallest criticism, any number; a larger one keeps fewer experts."""
    max_k: int | None = None
    """Most experts per token; None: the model's own k. A larger value widens the router."""
    null: str = "background"
    """Null distribution of the p-values."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        is_number = isinstance(self.threshold, (int, float)) and not isinstance(
            self.threshold, bool
        )
        if not is_number or not isfinite(self.threshold):
            raise InputError(f"threshold must be a finite number, got {self.threshold!r}")
        if self.max_k is not None:
            check_count("max_k", self.max_k)
        if get_null(self.null).by_expert:
            raise InputError(
                f"higher_criticism compares with one table a layer, null {self.null!r} has one an "
                "expert; use method bh, or null: background"
            )
        super().__post_init__()

    @property
    def required_null(self) -> str | None:
        """Name of the null if it needs a table, else None."""
        return self.null if get_null(self.null).needs_table else None

    def most_kept(self, model_top_k: int) -> int:
        """Return max_k, or the model's own k if it is None."""
        return model_top_k if self.max_k is None else self.max_k

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if the rule keeps more experts than a layer has."""
        check_at_most_experts("max_k", self.most_kept(model_top_k), num_experts)

    def plan(self, context: LayerContext) -> Plan:
        """Convert the threshold to a critical value per rank.

        Raises:
            InputError: max_k exceeds the experts of the layer.
            CalibrationError: the null needs a table and the context has none.
        """
        self.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
        null, threshold, most = (
            get_null(self.null),
            self.threshold,
            self.most_kept(context.model_top_k),
        )
        lines_E = cut_offs_where(
            null, context.num_experts, lambda p_E: criticism_reaches(p_E, threshold), context.table
        )
        lines_E[most:] = torch.inf
        return Plan(
            decision="step_up",
            max_k=most,
            null=null,
            temperature=self.temperature,
            lines=lines_E.to(context.device),
        )
