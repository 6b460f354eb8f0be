"""A layer's router under a rule: the family's proposal, the decision, and the kept slots' weights.

Axes: B sequences, S positions, T = B * S tokens, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from bh_routing.rules.base import LayerContext, Rule, TemperatureWeights, WeightConvention
from bh_routing.rules.plan import Candidates, Rows, keep_best

# Below any relevant sum of weights, and large enough for a finite quotient.
_SMALLEST_SUM: Final = 1e-30


class RoutedSlots(NamedTuple):
    """Decided and weighted slots of T tokens in one layer."""

    top_k_index_TK: Tensor
    """int64; dropped slots hold the expert of the token's best kept slot."""
    top_k_weights_TK: Tensor
    """In the family's dtype; exactly 0 where dropped."""
    keep_TK: Tensor
    """bool."""

    @property
    def expert_counts_T(self) -> Tensor:
        """Number of kept slots, int32."""
        return self.keep_TK.sum(-1, dtype=torch.int32)

    def of_real(self, is_real_BS: Tensor) -> RoutedSlots:
        """Drop all slots of tokens that aren't real; no host sync."""
        is_real_T1 = is_real_BS.reshape(-1, 1)
        weights_TK = self.top_k_weights_TK.masked_fill(~is_real_T1, 0.0)
        return RoutedSlots(self.top_k_index_TK, weights_TK, self.keep_TK & is_real_T1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighing:
    """The weights of kept slots, made of the family's weights of all candidates.

    Conventions, at temperature 1:

    - "model": a family that renormalises does so over the kept slots, w * sum(all) / sum(kept),
      which preserves the family's scale; other families keep their raw weights.
    - "renormalize": the kept weights sum to 1.
    - "preserve_mass": the kept weights have the sum of the model's own top-k; the same as "model"
      in a family that renormalises.

    At another temperature T the kept slots share their sum at T = 1 in proportion to
    exp(logit / T). "raw" is the ablation without that rescaling: a softmax family's own weights
    for logits / T. Both are for softmax-scored families only.
    """

    normalises: bool
    """Whether the family's top-k weights sum to a constant."""
    model_top_k: int
    """The model's own k; less than K if the router was widened."""
    convention: WeightConvention = "model"
    temperature: float = 1.0
    temperature_weights: TemperatureWeights = "mass"
    keeps_best_by_logit: bool = False
    """Whether every token keeps the slot with its largest logit."""

    @classmethod
    def of(cls, rule: Rule, *, normalises: bool, model_top_k: int) -> Weighing:
        """Return the weighing that a rule asks for in a family."""
        return cls(
            normalises=normalises,
            model_top_k=model_top_k,
            convention=rule.weights,
            temperature=rule.temperature,
            temperature_weights=rule.temperature_weights,
            keeps_best_by_logit=rule.keeps_best_by_logit,
        )

    def route(self, candidates: Candidates, keep_TK: Tensor) -> RoutedSlots:
        """Weigh the kept slots and alias the dropped ones; at least one is kept. No host sync."""
        weights_TK, index_TK = self.weights(candidates, keep_TK), candidates.top_k_index_TK
        if self.keeps_best_by_logit and candidates.sorted_logits_TE is not None:
            aliased_TK = torch.where(keep_TK, index_TK, index_TK[:, :1])
            return RoutedSlots(aliased_TK, weights_TK, keep_TK)
        return RoutedSlots(*alias_dropped(index_TK, weights_TK, keep_TK), keep_TK)

    def weights(self, candidates: Candidates, keep_TK: Tensor) -> Tensor:
        """Return weights in the family's dtype, exactly 0 in dropped slots. No host sync.

        The candidates' weights are the family's at temperature 1.
        """
        weights_TK = candidates.top_k_weights_TK.to(torch.float32)
        is_tempered = self.temperature != 1.0
        if is_tempered and self.temperature_weights == "raw" and not self.normalises:
            # A family that normalises undoes the rescaling, so raw equals mass there.
            weights_TK = weights_TK * _softmax_ratio(candidates, self.temperature)
            is_tempered = False
        kept_TK = torch.where(keep_TK, weights_TK, 0.0)
        if self.convention == "renormalize":
            kept_TK = kept_TK / _sum(kept_TK)
        elif self.normalises:
            kept_TK = kept_TK * (_sum(weights_TK) / _sum(kept_TK))
        elif self.convention == "preserve_mass":
            is_own_TK = keep_best(candidates, self.model_top_k)
            kept_TK = kept_TK * (_sum(torch.where(is_own_TK, weights_TK, 0.0)) / _sum(kept_TK))
        if is_tempered:
            kept_TK = self._tempered(candidates, keep_TK, kept_TK)
        return kept_TK.to(candidates.top_k_weights_TK.dtype)

    def _tempered(self, candidates: Candidates, keep_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """Distribute the sum of the kept weights in proportion to exp(logit / temperature)."""
        logits_TK = candidates.router_logits_TE.gather(-1, candidates.top_k_index_TK)
        tempered_TK = logits_TK.to(torch.float32) / self.temperature
        fraction_TK = tempered_TK.masked_fill(~keep_TK, float("-inf")).softmax(dim=-1)
        return fraction_TK * kept_TK.sum(dim=-1, keepdim=True)


def alias_dropped(
    top_k_index_TK: Tensor, weights_TK: Tensor, keep_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Give dropped slots weight 0 and the index of the token's best kept expert.

    Any implementation of the experts then computes the weighted sum without reading a dropped
    expert. At least one slot per token is kept. No host sync.

    Example:
        >>> index, weights = alias_dropped(
        ...     torch.tensor([[7, 3, 5]]),
        ...     torch.tensor([[0.2, 0.1, 0.6]]),
        ...     torch.tensor([[True, False, True]]),
        ... )
        >>> index.tolist(), [round(weight, 1) for weight in weights[0].tolist()]
        ([[7, 5, 5]], [0.2, 0.0, 0.6])
    """
    is_dropped_TK = ~keep_TK
    best_slot_T1 = weights_TK.masked_fill(is_dropped_TK, float("-inf")).argmax(-1, keepdim=True)
    best_expert_T1 = top_k_index_TK.gather(-1, best_slot_T1)
    return (
        torch.where(keep_TK, top_k_index_TK, best_expert_T1),
        weights_TK.masked_fill(is_dropped_TK, 0.0),
    )


def _sum(weights_TK: Tensor) -> Tensor:
    return weights_TK.sum(dim=-1, keepdim=True).clamp_min(_SMALLEST_SUM)


def _softmax_ratio(candidates: Candidates, temperature: float) -> Tensor:
    """Return softmax(logits / T) / softmax(logits) at the slots."""
    logits_TE = candidates.router_logits_TE.to(torch.float32)
    tempered_TE = (logits_TE / temperature).log_softmax(dim=-1)
    ratio_TE = tempered_TE - logits_TE.log_softmax(dim=-1)
    return ratio_TE.gather(-1, candidates.top_k_index_TK).exp()


class Router(Protocol):
    """A layer's router under a rule."""

    def __call__(
        self, router_logits_TE: Tensor, is_real_BS: Tensor | None = None, /
    ) -> RoutedSlots:
        """Return slots in descending order of logit; no host sync.

        Args:
            router_logits_TE: as returned by the family's linear layer.
            is_real_BS: False for padding and for sequences that have ended, which keep nothing and
                don't vote. S is 1 in a decode step. None: a step without any.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxFamily:
    """A router with a softmax over all experts in float32, followed by the k largest weights."""

    normalises: bool
    """Whether the k weights are divided by their sum."""
    weights_dtype: torch.dtype | None = None
    """Final dtype of the weights; None for that of the logits."""

    def propose(self, router_logits_TE: Tensor, num_slots: int) -> Candidates:
        """Propose the slots with the largest logits; ties go to the smaller expert index.

        `torch.topk` breaks ties in any order, so its result may differ among equal logits.
        """
        # float64 is preserved, so that weights are as precise as the logits.
        logits_TE = router_logits_TE.to(torch.promote_types(router_logits_TE.dtype, torch.float32))
        sorted_TE, order_TE = logits_TE.sort(dim=-1, descending=True, stable=True)
        index_TK = order_TE[:, :num_slots]
        weights_TK = logits_TE.softmax(dim=-1).gather(-1, index_TK)
        if self.normalises:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        dtype = self.weights_dtype or router_logits_TE.dtype
        return Candidates(
            logits_TE, index_TK, weights_TK.to(dtype), sorted_logits_TE=sorted_TE.detach().float()
        )

    def as_compared(self, candidates: Candidates, model_top_k: int) -> Candidates:
        """Return proposed candidates with the weights that a rule compares, as in calibration.

        If the family normalises, those of the model's own top-k sum to 1.
        """
        if not self.normalises or candidates.top_k_index_TK.shape[-1] == model_top_k:
            return candidates
        weights_TK = candidates.top_k_weights_TK.float()
        weights_TK = weights_TK / weights_TK[:, :model_top_k].sum(dim=-1, keepdim=True)
        return candidates._replace(
            top_k_weights_TK=weights_TK.to(candidates.top_k_weights_TK.dtype)
        )


def reference_router(rule: Rule, context: LayerContext, family: SoftmaxFamily) -> Router:
    """Bind a rule to a layer in torch, for any device.

    It supports all rules that don't need expert outputs.

    Raises:
        InputError: the rule doesn't fit the layer, or lacks a calibration.
    """
    select = rule.bind(context)
    model_top_k = context.model_top_k
    num_slots = rule.num_candidates(model_top_k)
    weighing = Weighing.of(rule, normalises=family.normalises, model_top_k=model_top_k)

    def route(router_logits_TE: Tensor, is_real_BS: Tensor | None = None) -> RoutedSlots:
        candidates = family.propose(router_logits_TE, num_slots)
        compared = family.as_compared(candidates, model_top_k)
        if rule.unit != "token":
            if is_real_BS is None:
                rows = Rows.of_step(len(router_logits_TE), router_logits_TE.device)
            else:
                rows = Rows.of_batch(is_real_BS, torch.zeros_like(is_real_BS))
            compared = compared._replace(rows=rows)
        slots = weighing.route(candidates, select(compared))
        return slots if is_real_BS is None else slots.of_real(is_real_BS)

    return route
