"""Rules with a fixed number of experts: static top-k, top-k per layer, and the random control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite
from typing import ClassVar, Final

import torch
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.rules.base import (
    EXPERTS,
    WHOLE,
    Knob,
    LayerContext,
    MixingRule,
    Rule,
    TemperatureWeights,
    WeightConvention,
    check_at_most_experts,
    check_count,
    check_mixture,
)
from bh_routing.rules.plan import Candidates, Plan, Selector, rank_slots


@dataclass(frozen=True)
class TopK(Rule):
    """Keep each token's k best experts; k may exceed the model's own.

    Example:
        >>> TopK(8).num_candidates(model_top_k=2)
        8
    """

    method: ClassVar[str] = "top_k"
    knob: ClassVar[Knob | None] = Knob("k", WHOLE, keeps_more=True)

    k: int
    """Experts per token, from 1 to the experts of a layer."""
    temperature: float = 1.0
    """Divides the router logits; changes the mixture, not the selection."""
    weights: WeightConvention = "model"
    """Convention for the kept slots' weights."""
    temperature_weights: TemperatureWeights = "mass"
    """Effect of another temperature on the sum of the kept slots' weights."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        check_count("k", self.k)
        check_mixture(self.weights, self.temperature, self.temperature_weights)

    def most_kept(self, model_top_k: int) -> int:
        """Return k."""
        return self.k

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if the rule keeps more experts than a layer has."""
        check_at_most_experts("k", self.k, num_experts)

    def plan(self, context: LayerContext) -> Plan:
        """Return the plan, which doesn't depend on the layer."""
        self.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
        return Plan(decision="count", max_k=self.k)


@dataclass(frozen=True)
class PerLayerTopK(MixingRule):
    """Keep k[layer] experts per token.

    Example:
        >>> PerLayerTopK.at_mean(4.5, layer_order=(2, 0, 3, 1)).k
        (5, 4, 5, 4)
    """

    method: ClassVar[str] = "per_layer_top_k"
    knob: ClassVar[Knob | None] = Knob(
        "mean_experts",
        EXPERTS,
        keeps_more=True,
        fields_from=lambda mean, layers: {"k": PerLayerTopK.at_mean(mean, range(layers)).k},
    )

    k: tuple[int, ...]
    """Experts per token in each layer with a router, first layer first; may be given as a list."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        if isinstance(self.k, (str, int)) or not isinstance(self.k, Sequence) or not self.k:
            raise InputError(f"k must be a list with one whole number a layer, got {self.k!r}")
        for layer, k in enumerate(self.k):
            check_count(f"k of layer {layer}", k)
        # A configuration file gives a list, but a rule must be hashable.
        object.__setattr__(self, "k", tuple(self.k))
        super().__post_init__()

    @classmethod
    def at_mean(cls, mean_experts: float, layer_order: Sequence[int]) -> PerLayerTopK:
        """Distribute a mean number of experts: k per layer, k + 1 in the first of `layer_order`.

        The mean is met to within half an expert in one layer.

        Args:
            mean_experts: mean over layers, at least 1.
            layer_order: every layer once, the most sensitive first.
        """
        num_layers = len(layer_order)
        if sorted(layer_order) != list(range(num_layers)):
            raise InputError(
                f"layer_order must name each layer once from 0 on, got {list(layer_order)}"
            )
        base, extra = divmod(round(mean_experts * num_layers), num_layers)
        larger = set(layer_order[:extra])
        return cls(tuple(base + (layer in larger) for layer in range(num_layers)))

    @classmethod
    def from_losses(cls, mean_experts: float, losses_LK: Sequence[Sequence[float]]) -> PerLayerTopK:
        """Distribute a mean number of experts at minimal loss, if the layers' losses add up.

        Starting from all experts, it repeatedly removes one from the layer whose loss increases
        least, until the total is met to within half an expert: optimal if losses are convex.

        Args:
            mean_experts: mean over layers, at least 1.
            losses_LK: for each layer, the loss if it alone keeps 1, 2, ... K experts.
        Example:
            >>> PerLayerTopK.from_losses(2.0, [[0.9, 0.4, 0.0], [0.3, 0.1, 0.0]]).k
            (3, 1)
        """
        k = [len(losses) for losses in losses_LK]
        for _ in range(sum(k) - round(mean_experts * len(k))):
            _, layer = min(
                (losses_LK[layer][kept - 2] - losses_LK[layer][kept - 1], layer)
                for layer, kept in enumerate(k)
                if kept > 1
            )
            k[layer] -= 1
        return cls(tuple(k))

    def most_kept(self, model_top_k: int) -> int:
        """Return the largest k of a layer."""
        return max(self.k)

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if the rule keeps more experts than a layer has."""
        check_at_most_experts("the largest k", max(self.k), num_experts)

    def plan(self, context: LayerContext) -> Plan:
        """Return the plan of the layer.

        Raises:
            InputError: k doesn't have one entry per layer, or an entry exceeds the experts.
        """
        num_layers = context.layer + 1 if context.num_layers is None else context.num_layers
        if len(self.k) < num_layers or (context.num_layers and len(self.k) > num_layers):
            raise InputError(
                f"k has {len(self.k)} entries, the model has {num_layers} layers with a router; "
                "give one for each"
            )
        self.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
        return Plan(decision="count", max_k=self.k[context.layer])


# Odd constants of splitmix64, as int64; the mixing relies on multiplication with wrap-around.
_GOLDEN: Final = -7046029254386353131
_MIX_1: Final = -4658895280553007687
_MIX_2: Final = -7723592293110705685


@dataclass(frozen=True)
class RandomK(MixingRule):
    """Keep k experts, k drawn for each token and layer from a given histogram.

    The draw is a hash of the token's router logits, the layer and the seed. It needs no generator
    and no host sync, doesn't depend on the batch, and is equal for tokens with equal logits.

    Example:
        >>> RandomK.at_mean(4.25).shares
        (0.0, 0.0, 0.0, 0.75, 0.25)
    """

    method: ClassVar[str] = "random_k"
    knob: ClassVar[Knob | None] = Knob(
        "mean_experts",
        EXPERTS,
        keeps_more=True,
        fields_from=lambda mean, _: {"shares": RandomK.at_mean(mean).shares},
    )

    shares: tuple[float, ...]
    """Fraction of tokens with 1, 2, ... experts; scaled to sum to 1, so counts are valid too."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        """Raise InputError if a field is out of range."""
        if isinstance(self.shares, str) or not isinstance(self.shares, Sequence):
            raise InputError(f"shares must be a list of numbers, got {self.shares!r}")
        is_valid = all(isinstance(s, (int, float)) and isfinite(s) and s >= 0 for s in self.shares)
        if not is_valid or sum(self.shares) <= 0:
            raise InputError(
                "shares must be finite numbers of at least 0, one of them above 0, got "
                f"{list(self.shares)!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed must be a whole number, got {self.seed!r}")
        object.__setattr__(self, "shares", tuple(float(share) for share in self.shares))
        super().__post_init__()

    @classmethod
    def at_mean(cls, mean_experts: float, seed: int = 0) -> RandomK:
        """Mix k and k + 1 to meet the mean: static top-k with a fractional budget."""
        base = floor(mean_experts)
        share = mean_experts - base
        lower = (0.0,) * (base - 1) + (1.0 - share,)
        return cls((*lower, share) if share else lower, seed=seed)

    def most_kept(self, model_top_k: int) -> int:
        """Return the largest count of the histogram."""
        return max(count for count, share in enumerate(self.shares, start=1) if share > 0)

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Raise InputError if the rule keeps more experts than a layer has."""
        most_kept = self.most_kept(model_top_k)
        check_at_most_experts("the largest count of shares", most_kept, num_experts)

    def bind(self, context: LayerContext) -> Selector:
        """Return a selector with the layer's hash and the cumulative histogram.

        A plan has no hash of the logits.
        """
        self.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
        shares_C = torch.tensor(
            self.shares[: self.most_kept(context.model_top_k)], dtype=torch.float64
        )
        # Without the last edge: rounding must not put a draw beyond it.
        edges_C = (shares_C.cumsum(0) / shares_C.sum())[:-1].to(context.device)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + context.layer) % 2**63)
        odd_E = torch.randint(-(2**62), 2**62, (context.num_experts,), generator=generator) * 2 + 1
        odd_E = odd_E.to(context.device)

        def select(candidates: Candidates) -> Tensor:
            # Adding 0 converts negative zero to positive zero.
            bits_TE = (candidates.router_logits_TE.float() + 0.0).view(torch.int32).long()
            uniform_T1 = _uniform((bits_TE * odd_E).sum(dim=-1, keepdim=True))
            counts_T1 = 1 + (uniform_T1 >= edges_C).sum(dim=-1, keepdim=True)
            return rank_slots(candidates) < counts_T1

        return select


def _uniform(keys: Tensor) -> Tensor:
    """Mix int64 keys into float64 numbers in [0, 1) by splitmix64's finaliser.

    Source: Steele, Lea & Flood (2014), "Fast Splittable Pseudorandom Number Generators".
    """
    mixed = keys + _GOLDEN
    mixed = (mixed ^ _shift(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shift(mixed, 27)) * _MIX_2
    mixed = mixed ^ _shift(mixed, 31)
    return _shift(mixed, 11).double() * 2.0**-53


def _shift(keys: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right without sign extension."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)
