"""BH-select: an expert stays if its score is significantly above those of background experts.

Axes: T tokens, E experts, K candidate slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.multitest import Procedure, check_alpha
from bh_routing.multitest.step_up import STOREY_LAMBDA, harmonic_number, on_or_below_line, ranks
from bh_routing.nulls.catalog import get_null
from bh_routing.nulls.cut_offs import (
    StoreyCutOffs,
    count_at_cut_offs,
    count_at_storey_cut_offs,
    cut_offs,
    storey_cut_offs,
)
from bh_routing.rules.base import (
    LOG_ODDS,
    Candidates,
    Knob,
    LayerContext,
    Rule,
    Selector,
    TemperatureWeights,
    WeightConvention,
    check_at_most_experts,
    check_choice,
    check_count,
    check_min_k,
    check_mixture,
)
from bh_routing.rules.weights import keep_best

OnEmpty = Literal["min_k", "model_k"]


@dataclass(frozen=True)
class BenjaminiHochberg(Rule):
    """Keep the experts that Benjamini-Hochberg rejects as background, between min_k and max_k.

    Rejections are counted over all E experts, the count is limited, and that number of best
    candidates stays. Under a null with one table per expert, the best have the smallest p-values,
    and a rejected expert that the router didn't propose can't stay. Alpha is a nominal level under
    the fitted null distribution; docs/method.md explains its meaning under each.

    Example:
        >>> BenjaminiHochberg(alpha=0.05, max_k=10).num_candidates(model_top_k=8)
        10
        >>> BenjaminiHochberg(alpha=0.05).most_kept(model_top_k=2)
        2
    """

    method: ClassVar[str] = "bh"
    knob: ClassVar[Knob | None] = Knob("alpha", LOG_ODDS, keeps_more=True)

    alpha: float = 0.05
    """Target FDR under the null distribution, in (0, 1); a larger one keeps more experts."""
    temperature: float = 1.0
    """Divides the router logits; changes the selection only under the null "softmax"."""
    min_k: int = 1
    """Fewest experts per token."""
    max_k: int | None = None
    """Most experts per token; None: the model's own k. A larger value widens the router."""
    null: str = "background"
    """Null distribution of the p-values."""
    procedure: Procedure = "bh"
    """"bh"; "by", which is valid under any dependence; or "storey", which is adaptive."""
    on_empty: OnEmpty = "min_k"
    """A token without any rejection keeps min_k experts, or the model's own k within
    [min_k, max_k]."""
    weights: WeightConvention = "model"
    """Convention for the kept slots' weights."""
    temperature_weights: TemperatureWeights = "mass"
    """Effect of another temperature on the sum of the kept slots' weights."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_alpha(self.alpha)
        check_count("min_k", self.min_k)
        if self.max_k is not None:
            check_count("max_k", self.max_k)
            if self.min_k > self.max_k:
                raise InputError(
                    f"min_k must be at most max_k, got min_k={self.min_k} and max_k={self.max_k}; "
                    "lower min_k or raise max_k"
                )
        get_null(self.null)
        check_choice("procedure", self.procedure, get_args(Procedure))
        check_choice("on_empty", self.on_empty, get_args(OnEmpty))
        check_mixture(self.weights, self.temperature, self.temperature_weights)

    @property
    def required_null(self) -> str | None:
        """Name of the null if it needs a table, else None."""
        return self.null if get_null(self.null).needs_table else None

    def smallest_alpha(self, num_experts: int) -> float | None:
        """Return alpha; for "by" divided by 1 + 1/2 + ... + 1/E, like its step-up line.

        For "storey" it is divided by the largest possible estimate of the fraction of true nulls.
        """
        if self.procedure == "by":
            return self.alpha / harmonic_number(num_experts)
        if self.procedure == "storey":
            return self.alpha * num_experts * (1 - STOREY_LAMBDA) / (num_experts + 1)
        return self.alpha

    def most_kept(self, model_top_k: int) -> int:
        """Return max_k, or the model's own k if it is None."""
        return model_top_k if self.max_k is None else self.max_k

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if most_kept exceeds the number of experts, or min_k most_kept."""
        most_kept = self.most_kept(model_top_k)
        check_at_most_experts("max_k", most_kept, num_experts)
        check_min_k(self.min_k, most_kept)

    @property
    def keeps_best_by_logit(self) -> bool:
        """Whether the null has one table per layer, not one per expert."""
        return not get_null(self.null).by_expert

    def count_kept(self, num_rejected: int, model_top_k: int) -> int:
        """Return the number of experts kept for a number of rejections among a token's slots."""
        is_empty = num_rejected == 0 and self.on_empty == "model_k"
        wanted = model_top_k if is_empty else num_rejected
        return min(max(wanted, self.min_k), self.most_kept(model_top_k))

    def bind(self, context: LayerContext) -> Selector:
        """Compute the layer's critical values and return a selector that only compares.

        Raises:
            InputError: max_k exceeds the experts of the layer, or min_k the most kept per token.
            CalibrationError: the null needs a table and the context has none.
        """
        self.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
        null = get_null(self.null)
        kept = [self.count_kept(n, context.model_top_k) for n in range(context.num_experts + 1)]
        kept_by_count = torch.tensor(kept, device=context.device)
        if null.by_expert:
            return self._select_by_p_values(context, kept_by_count)
        count = self._counter(context)
        temperature = self.temperature

        def select(candidates: Candidates) -> Tensor:
            scores_TE = null.descending_scores(candidates.router_logits_TE, temperature)
            return keep_best(candidates, kept_by_count.take(count(scores_TE)))

        return select

    def slot_p_values(self, context: LayerContext) -> Callable[[Candidates], Tensor] | None:
        """Return the upper tail of the null distribution at each candidate's score."""
        null, temperature = get_null(self.null), self.temperature
        table = null.require_table(context.table).to(context.device) if null.needs_table else None

        def p_values(candidates: Candidates) -> Tensor:
            scores_TE = null.score(candidates.router_logits_TE, temperature)
            return null.p_from_score(scores_TE, table).gather(-1, candidates.top_k_index_TK)

        return p_values

    def _select_by_p_values(self, context: LayerContext, kept_by_count: Tensor) -> Selector:
        """Reject by p-values: experts with tables of their own have no common critical values."""
        null = get_null(self.null)
        table = null.require_table(context.table).to(context.device)
        alpha, procedure, temperature = self.alpha, self.procedure, self.temperature

        def select(candidates: Candidates) -> Tensor:
            p_TE = null.p_from_score(null.score(candidates.router_logits_TE, temperature), table)
            sorted_p_TE = p_TE.sort(dim=-1).values
            is_below_TE = on_or_below_line(sorted_p_TE, alpha, procedure)
            last_rejected_T1 = torch.where(is_below_TE, sorted_p_TE, -1.0).amax(-1, keepdim=True)
            p_TK = p_TE.gather(-1, candidates.top_k_index_TK)
            num_rejected_T1 = (p_TK <= last_rejected_T1).sum(dim=-1, keepdim=True)
            return keep_best(candidates, kept_by_count.take(num_rejected_T1), -p_TK)

        return select

    def _counter(self, context: LayerContext) -> Callable[[Tensor], Tensor]:
        """Return descending scores (T, E) -> number rejected (T, 1), by critical values."""
        null, device = get_null(self.null), context.device
        rank_E = ranks(context.num_experts, device)
        if self.procedure == "storey":
            lines = storey_cut_offs(null, self.alpha, context.num_experts, context.table)
            there = StoreyCutOffs(lines.lines_CE.to(device), lines.smallest_not_large.to(device))
            return lambda scores_TE: count_at_storey_cut_offs(scores_TE, there, rank_E)
        cut_offs_E = cut_offs(null, self.alpha, context.num_experts, context.table, self.procedure)
        cut_offs_E = cut_offs_E.to(device)
        return lambda scores_TE: count_at_cut_offs(scores_TE, cut_offs_E, rank_E)
