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
from bh_routing.multitest.step_up import STOREY_LAMBDA, harmonic_number, on_or_below_line
from bh_routing.nulls.catalog import get_null
from bh_routing.nulls.cut_offs import cut_offs, storey_cut_offs
from bh_routing.rules.base import (
    LOG_ODDS,
    Knob,
    LayerContext,
    Rule,
    TemperatureWeights,
    WeightConvention,
    check_at_most_experts,
    check_choice,
    check_count,
    check_min_k,
    check_mixture,
)
from bh_routing.rules.plan import Candidates, Plan, Selector, interpret, rank_slots

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

    def plan(self, context: LayerContext) -> Plan | None:
        """Return the layer's critical values; None if experts have tables of their own.

        Raises:
            InputError: max_k exceeds the experts of the layer, or min_k the most kept per token.
            CalibrationError: the null needs a table and the context has none.
        """
        self.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
        null, alpha, num_experts = get_null(self.null), self.alpha, context.num_experts
        if null.by_expert:
            return None
        storey = None
        if self.procedure == "storey":
            storey = storey_cut_offs(null, alpha, num_experts, context.table).to(context.device)
            lines = storey.lines_CE
        else:
            lines = cut_offs(null, alpha, num_experts, context.table, self.procedure)
        return Plan(
            decision="step_up",
            min_k=self.min_k,
            max_k=self.most_kept(context.model_top_k),
            empty_k=context.model_top_k if self.on_empty == "model_k" else 0,
            null=null,
            temperature=self.temperature,
            lines=lines.to(context.device),
            storey=storey,
        )

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector of a layer; tables by expert have no common critical values."""
        plan = self.plan(context)
        return self._select_by_p_values(context) if plan is None else interpret(plan)

    def slot_p_values(self, context: LayerContext) -> Callable[[Candidates], Tensor] | None:
        """Return the upper tail of the null distribution at each candidate's score."""
        null, temperature = get_null(self.null), self.temperature
        table = null.require_table(context.table).to(context.device) if null.needs_table else None

        def p_values(candidates: Candidates) -> Tensor:
            scores_TE = null.score(candidates.router_logits_TE, temperature)
            return null.p_from_score(scores_TE, table).gather(-1, candidates.top_k_index_TK)

        return p_values

    def _select_by_p_values(self, context: LayerContext) -> Selector:
        null, model_top_k = get_null(self.null), context.model_top_k
        table = null.require_table(context.table).to(context.device)
        alpha, procedure, temperature = self.alpha, self.procedure, self.temperature
        least, most = self.min_k, self.most_kept(model_top_k)
        empty_k = model_top_k if self.on_empty == "model_k" else 0

        def select(candidates: Candidates) -> Tensor:
            p_TE = null.p_from_score(null.score(candidates.router_logits_TE, temperature), table)
            sorted_p_TE = p_TE.sort(dim=-1).values
            is_below_TE = on_or_below_line(sorted_p_TE, alpha, procedure)
            last_rejected_T1 = torch.where(is_below_TE, sorted_p_TE, -1.0).amax(-1, keepdim=True)
            p_TK = p_TE.gather(-1, candidates.top_k_index_TK)
            num_rejected_T1 = (p_TK <= last_rejected_T1).sum(dim=-1, keepdim=True)
            counts_T1 = torch.where(num_rejected_T1 == 0, empty_k, num_rejected_T1)
            return rank_slots(candidates, -p_TK) < counts_T1.clamp(least, most)

        return select
