"""Random k: the control that has a rule's counts without its choice of tokens.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite
from typing import ClassVar, Final

import torch
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.rules.base import Candidates, LayerContext, Selector
from bh_routing.rules.fields import check_at_most_experts
from bh_routing.rules.knobs import EXPERTS, Knob
from bh_routing.rules.mixing import MixingRule
from bh_routing.rules.slots import keep_best

# Odd constants of splitmix64, as int64; multiplication wraps around, which is what mixes.
_GOLDEN: Final = -7046029254386353131
_MIX_1: Final = -4658895280553007687
_MIX_2: Final = -7723592293110705685


@dataclass(frozen=True)
class RandomK(MixingRule):
    """Keep k experts, k drawn for each token and layer from a given histogram.

    The draw is a hash of the token's router logits, the layer and the seed. So it needs no
    generator and no host sync, is the same alone and in any batch, and two tokens with equal
    logits draw alike.

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
    """Share of tokens with 1, 2, ... experts; scaled to sum 1, so counts may be given too."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
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
        """Mix k and k + 1 so that the mean is met: static top-k at a fractional budget."""
        base = floor(mean_experts)
        share = mean_experts - base
        lower = (0.0,) * (base - 1) + (1.0 - share,)
        return cls((*lower, share) if share else lower, seed=seed)

    def most_kept(self, model_top_k: int) -> int:
        """Return the largest count of the histogram."""
        return max(count for count, share in enumerate(self.shares, start=1) if share > 0)

    def check(self, *, num_experts: int, model_top_k: int) -> None:
        """Refuse more experts than there are."""
        most_kept = self.most_kept(model_top_k)
        check_at_most_experts("the largest count of shares", most_kept, num_experts)

    def bind(self, context: LayerContext) -> Selector:
        """Prepare the layer's hash and the histogram's cumulative shares."""
        self.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
        shares_C = torch.tensor(
            self.shares[: self.most_kept(context.model_top_k)], dtype=torch.float64
        )
        # The last edge is left out: no draw may fall beyond it by rounding.
        edges_C = (shares_C.cumsum(0) / shares_C.sum())[:-1].to(context.device)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + context.layer) % 2**63)
        odd_E = torch.randint(-(2**62), 2**62, (context.num_experts,), generator=generator) * 2 + 1
        odd_E = odd_E.to(context.device)

        def select(candidates: Candidates) -> Tensor:
            # Adding 0 turns a negative zero into the positive one.
            bits_TE = (candidates.router_logits_TE.float() + 0.0).view(torch.int32).long()
            uniform_T1 = _uniform((bits_TE * odd_E).sum(dim=-1, keepdim=True))
            counts_T1 = 1 + (uniform_T1 >= edges_C).sum(dim=-1, keepdim=True)
            return keep_best(candidates, counts_T1)

        return select


def _uniform(keys: Tensor) -> Tensor:
    """Mix int64 keys into float64 numbers in [0, 1), as splitmix64 ends.

    Source: Steele, Lea & Flood (2014), "Fast Splittable Pseudorandom Number Generators".
    """
    mixed = keys + _GOLDEN
    mixed = (mixed ^ _shift(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shift(mixed, 27)) * _MIX_2
    mixed = mixed ^ _shift(mixed, 31)
    return _shift(mixed, 11).double() * 2.0**-53


def _shift(keys: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right without dragging the sign along."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)
