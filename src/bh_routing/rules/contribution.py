"""Slots by what they are expected to contribute: shared by the rules that drop slots.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.nulls.contributions import (
    BY_LOSS,
    NEEDED,
    Contributions,
    Definition,
    Statistic,
    remedy,
)
from bh_routing.rules.base import Candidates, LayerContext
from bh_routing.rules.fields import check_choice, check_count, check_min_k
from bh_routing.rules.mixing import MixingRule


@dataclass(frozen=True, kw_only=True)
class DroppingRule(MixingRule):
    """A rule that drops the model's own slots by a score of each slot.

    It may drop a slot with a larger router logit than one it keeps.
    """

    min_k: int = 1
    """Slots with the largest scores that always stay."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_count("min_k", self.min_k)
        super().__post_init__()

    @property
    def keeps_best_by_logit(self) -> bool:
        """No: the expert's scale counts too."""
        return False

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError for a min_k above the model's own k: no other slot is proposed."""
        check_min_k(self.min_k, model_top_k)


@dataclass(frozen=True, kw_only=True)
class ContributionRule(DroppingRule):
    """A rule that drops slots by routing weight x calibrated scale."""

    statistic: Statistic = "sensitivity"
    """The scale: see `nulls.contributions.Statistic`. "contribution" is the choice for a model that
    gives no gradients, such as a quantised one."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        check_choice("statistic", self.statistic, get_args(Statistic))
        super().__post_init__()

    @property
    def required_null(self) -> str | None:
        """What calibration must have observed."""
        return needed_null(self.statistic, "norm")


def require_contributions(method: str, context: LayerContext) -> Contributions:
    """Return what is known of slots, or raise CalibrationError."""
    if context.contributions is None:
        raise CalibrationError(
            f"rule {method!r} needs a calibration that observed slots and none was given; "
            f"{remedy(NEEDED['loss'])}"
        )
    return context.contributions


def layer_scale(method: str, statistic: Statistic, context: LayerContext) -> Tensor:
    """Return the scale of each expert of the layer on its device, shape (E,)."""
    contributions = require_contributions(method, context)
    return contributions.scale(statistic, context.layer).to(context.device)


def slot_scores(candidates: Candidates, scale_E: Tensor) -> Tensor:
    """Return weight x scale of the slot's expert, float32, shape (T, K)."""
    # float32: bfloat16 scores tie, and a tie moves the count.
    return candidates.top_k_weights_TK.float() * scale_E[candidates.top_k_index_TK]


class RankedSlots(NamedTuple):
    """Slots of each token from the largest score to the smallest."""

    scores_TK: Tensor
    """In that order."""
    rank_TK: Tensor
    """int64: the rank of each slot, 0 for the largest, in the order of the slots."""


def rank_slots(candidates: Candidates, scores_TK: Tensor) -> RankedSlots:
    """Rank slots by score; a tie goes to the larger logit, then to the router's order."""
    logits_TK = candidates.router_logits_TE.gather(-1, candidates.top_k_index_TK)
    by_logit_TK = logits_TK.argsort(dim=-1, descending=True, stable=True)
    by_score_TK = scores_TK.gather(-1, by_logit_TK).argsort(dim=-1, descending=True, stable=True)
    order_TK = by_logit_TK.gather(-1, by_score_TK)
    place_K = torch.arange(order_TK.shape[-1], device=order_TK.device)
    rank_TK = torch.zeros_like(order_TK).scatter_(-1, order_TK, place_K.expand_as(order_TK))
    return RankedSlots(scores_TK.gather(-1, order_TK), rank_TK)


def needed_null(statistic: Statistic, definition: Definition) -> str:
    """Name what must be calibrated for a statistic and a definition of what mattered."""
    return NEEDED["loss" if statistic in BY_LOSS else definition]
