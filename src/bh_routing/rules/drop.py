"""BH-drop: a slot is dropped if its score is significantly below those of slots that mattered.

Axes: T tokens, E experts, K slots, N reference scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final, Literal, get_args

import torch
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.multitest import check_alpha, on_or_below_line
from bh_routing.multitest.step_up import number_blocks, reject_in_blocks
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.contributions import ALL_STEPS, NEEDED_STEPS, STEPS, Definition, needed_null
from bh_routing.nulls.cut_offs import smallest_scores
from bh_routing.rules.base import LOG_ODDS, Knob, LayerContext, Unit, check_choice, check_count
from bh_routing.rules.contribution import (
    ContributionRule,
    layer_scale,
    require_contributions,
    threshold_plan,
)
from bh_routing.rules.plan import Candidates, Plan, Selector, rank_slots, slot_scores
from bh_routing.rules.step import Between, StepExperts, StepRule, reject_in_steps, step_selector

Scope = Literal["token", "block", "population", "step", "step_population"]
_STEP_SCOPES: Final = ("step", "step_population")

_NOTHING: Final = -float("inf")


@dataclass(frozen=True)
class BenjaminiHochbergDrop(StepRule, ContributionRule):
    """Drop the slots for which Benjamini-Hochberg rejects "this slot matters".

    A slot's p-value is the fraction of needed calibration slots with no larger score,
    (1 + #{needed <= s}) / (n + 1). A flat router keeps its slots, a sharp one drops its tail.

    - scope "token": BH over each token's candidate slots, in one layer.
    - scope "block": BH over all slots of `block_tokens` consecutive tokens of one sequence and
      forward pass, in one layer. Blocks end with their sequence and exclude padding, so the result
      doesn't depend on the rest of the batch; in a decode step it equals "token".
    - scope "population": BH once over the calibration's own slots of all layers; its critical
      value t is then a fixed threshold: the same decisions as ContributionThreshold(t).
    - scope "step": BH over the experts that a decode step reads, in one layer. An expert's score is
      the root of its Fisher mass, sum of (weight x sensitivity) ** 2 over the step's tokens, and
      its p-value the fraction of needed calibration pairs of expert and step with no larger score.
      Steps of other sizes than 2, 4, 8, 16, 32 and 64 tokens interpolate p-values linearly in log2
      of the size; a step of one token is decided as by scope "token". See `rules.step`.
    - scope "step_population": BH once over the calibration's own pairs, for each step size; its
      critical values are interpolated likewise.

    If slots were exchangeable with the calibration's and their p-values independent or PRDS, the
    expected fraction of dropped slots that mattered would be at most alpha times the fraction of
    slots that matter. Models guarantee neither; docs/method.md reports measurements.

    Source: Benjamini & Hochberg (1995); Bates et al. (2023) for conformal p-values under BH; Jin &
        Candès (2023) for scope "population".
    Example:
        >>> BenjaminiHochbergDrop(0.2, scope="block", block_tokens=32).required_null
        'needed_by_loss'
    """

    method: ClassVar[str] = "bh_drop"
    knob: ClassVar[Knob | None] = Knob("alpha", LOG_ODDS, keeps_more=False)

    alpha: float
    """Target false discovery rate, in (0, 1); a larger one keeps fewer experts."""
    scope: Scope = "token"
    """The slots that are tested together."""
    needed: Definition = "norm"
    """Definition of the slots that mattered: see `nulls.contributions.Definition`. The
    scopes of steps always define them by loss."""
    block_tokens: int = 64
    """Tokens per block; only for scope "block"."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_alpha(self.alpha)
        check_choice("scope", self.scope, get_args(Scope))
        check_choice("needed", self.needed, get_args(Definition))
        check_count("block_tokens", self.block_tokens)
        if self.scope in _STEP_SCOPES:
            if self.statistic != "sensitivity":
                raise InputError(
                    f"scope {self.scope!r} is calibrated for statistic 'sensitivity', got "
                    f"{self.statistic!r}; leave it out, or use the rule fisher_mass"
                )
            # Only squared losses of slots add up to those of experts.
            object.__setattr__(self, "needed", "loss")
        elif self.refill is not None:
            raise InputError(
                f"refill is for the scopes 'step' and 'step_population', got scope {self.scope!r}; "
                "leave it out"
            )
        super().__post_init__()

    @property
    def required_null(self) -> str | None:
        """Name of the null that must be calibrated."""
        if self.scope in _STEP_SCOPES:
            return STEPS
        return needed_null(self.statistic, self.needed)

    @property
    def unit(self) -> Unit:
        """The step for the scopes of steps, the block for scope "block", else the token."""
        if self.scope in _STEP_SCOPES:
            return "step"
        return "block" if self.scope == "block" else "token"

    def smallest_alpha(self, num_experts: int) -> float | None:
        """Return alpha, which is conservative: there are fewer hypotheses than experts."""
        return self.alpha

    def plan(self, context: LayerContext) -> Plan | None:
        """Return the layer's critical values; None for scopes that decide tokens jointly.

        Raises:
            CalibrationError: the context has no contributions, or none for this statistic.
        """
        if self.unit != "token":
            return None
        if self.scope == "population":
            return threshold_plan(self, self.cut_off(context), context)
        return Plan(
            decision="drop",
            min_k=self.min_k,
            lines=self.cut_offs(context),
            scale_E=layer_scale(self.method, self.statistic, context),
        )

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector of a layer; a plan can't describe the tokens of a block or step."""
        if self.unit == "token":
            return super().bind(context)
        return self._bind_block(context) if self.scope == "block" else self._bind_step(context)

    def slot_p_values(self, context: LayerContext) -> Callable[[Candidates], Tensor] | None:
        """Return the lower tail of the slots that mattered; small where a slot can be dropped."""
        contributions = require_contributions(self.method, context)
        scale_E = layer_scale(self.method, self.statistic, context)
        needed = contributions.needed(self.statistic, self.needed).to(context.device)
        return lambda candidates: lower_tail(slot_scores(candidates, scale_E), needed)

    def cut_offs(self, context: LayerContext) -> Tensor:
        """Return the critical value of each rank for scope "token", on negated scores.

        Returns:
            float32 tensor of shape (K,) on the layer's device, smallest score first.
        """
        contributions = require_contributions(self.method, context)
        needed = contributions.needed(self.statistic, self.needed).to(torch.device("cpu"))
        # Small scores are rejected here: on negated scores the search is that of BH-select.
        return smallest_scores(
            lambda negated: lower_tail(-negated, needed),
            context.model_top_k,
            lambda p_K: on_or_below_line(p_K, self.alpha),
        ).to(context.device)

    def cut_off(self, context: LayerContext) -> float:
        """Return the largest score that scope "population" drops; -inf if nothing is rejected."""
        contributions = require_contributions(self.method, context)
        all_N = contributions.all_of(self.statistic).sorted_scores_N
        needed = contributions.needed(self.statistic, self.needed)
        return self._largest_rejected(all_N, _tail_of_all(all_N, needed.sorted_scores_N))

    def _largest_rejected(self, all_N: Tensor, p_N: Tensor) -> float:
        """Return the largest of ascending scores that BH over all of them rejects, or -inf."""
        is_below_N = on_or_below_line(p_N, self.alpha)
        return float(all_N[is_below_N][-1]) if bool(is_below_N.any()) else _NOTHING

    def _bind_block(self, context: LayerContext) -> Selector:
        contributions = require_contributions(self.method, context)
        scale_E = layer_scale(self.method, self.statistic, context)
        needed = contributions.needed(self.statistic, self.needed).to(context.device)
        alpha, min_k, block_tokens = self.alpha, self.min_k, self.block_tokens

        def select(candidates: Candidates) -> Tensor:
            scores_TK = slot_scores(candidates, scale_E)
            assert candidates.rows is not None  # our own bug: the caller sets them
            rows = candidates.rows
            block_T = number_blocks(rows.sequence_T, rows.position_T, block_tokens)
            is_dropped_TK = reject_in_blocks(lower_tail(scores_TK, needed), alpha, block_T)
            return ~is_dropped_TK | (rank_slots(candidates, scores_TK) < min_k)

        return select

    def _bind_step(self, context: LayerContext) -> Selector:
        scale_E = layer_scale(self.method, self.statistic, context)
        return step_selector(context, scale_E, self.min_k, self.step_reads(context))

    def step_reads(self, context: LayerContext) -> Callable[[StepExperts, Tensor], Tensor]:
        """Return experts and tokens of each step -> whether it reads an expert, bool (S, E).

        Only for the scopes of steps. A token's `min_k` best slots are read in addition.
        """
        if self.scope == "step_population":
            return self._reads_by_cut_off(context)
        p_values, alpha = self.step_p_values(context), self.alpha

        def reads(experts: StepExperts, tokens_S: Tensor) -> Tensor:
            p_SE = p_values(experts, tokens_S)
            return ~reject_in_steps(p_SE, experts.is_present_SE, alpha)

        return reads

    def step_p_values(self, context: LayerContext) -> Callable[[StepExperts, Tensor], Tensor]:
        """Return experts and tokens of each step -> p-value of each expert, float64 (S, E)."""
        contributions = require_contributions(self.method, context)
        one = contributions.needed(self.statistic, self.needed).to(context.device)
        needed_BN = contributions.step_tables(NEEDED_STEPS).to(context.device)
        between = Between.on(context.device)
        last = len(between.lower_B) - 1

        def p_values(experts: StepExperts, tokens_S: Tensor) -> Tensor:
            norms_SE = experts.norms_SE
            every_BM = norms_SE.flatten().expand(len(needed_BN), -1).contiguous()
            not_above_BM = torch.searchsorted(needed_BN, every_BM, side="right")
            larger_BM = (1 + not_above_BM).double() / (needed_BN.shape[-1] + 1)
            p_BSE = torch.cat(
                [lower_tail(norms_SE, one)[None], larger_BM.unflatten(-1, norms_SE.shape)]
            )
            size_S = tokens_S.clamp_max(last)
            lower_S, weight_S1 = between.lower_B[size_S], between.weight_B[size_S][:, None]
            at_1SE = lower_S[None, :, None].expand(1, *norms_SE.shape)
            p_SE, upper_SE = p_BSE.gather(0, at_1SE)[0], p_BSE.gather(0, at_1SE + 1)[0]
            return p_SE * (1 - weight_S1) + upper_SE * weight_S1

        return p_values

    def _reads_by_cut_off(self, context: LayerContext) -> Callable[[StepExperts, Tensor], Tensor]:
        cut_off_B = self.step_cut_offs(context).to(context.device)

        def reads(experts: StepExperts, tokens_S: Tensor) -> Tensor:
            at_S = tokens_S.clamp_max(len(cut_off_B) - 1)
            return experts.norms_SE > cut_off_B[at_S][:, None]

        return reads

    def step_cut_offs(self, context: LayerContext) -> Tensor:
        """Return the cut-off for each number of tokens up to 64, float64, on the CPU.

        Raises:
            CalibrationError: the context has no tables of steps.
        """
        contributions = require_contributions(self.method, context)
        every_BN = contributions.step_tables(ALL_STEPS)
        p_BN = _tail_of_all(every_BN, contributions.step_tables(NEEDED_STEPS))
        return Between.values(
            [self.cut_off(context)]
            + [self._largest_rejected(*pairs) for pairs in zip(every_BN, p_BN, strict=True)]
        )


def lower_tail(scores: Tensor, needed: ReferenceTable) -> Tensor:
    """Return (1 + #{needed <= s}) / (N + 1) as float64, in the shape of `scores`."""
    return _tail(scores, needed.sorted_scores_N)


def _tail(scores: Tensor, needed_N: Tensor) -> Tensor:
    not_above = torch.searchsorted(needed_N, scores.contiguous(), side="right")
    return (1 + not_above).to(torch.float64) / (needed_N.shape[-1] + 1)


# A search tries many alphas on the same tables, in every layer.
_tail_of_all = lru_cache(maxsize=8)(_tail)
"""The p-values of a calibration's own scores, by the identity of both tensors."""
