"""Static top-k with another k in each layer: how a budget is shared out over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.rules.base import Candidates, LayerContext, Selector
from bh_routing.rules.fields import check_at_most_experts, check_count
from bh_routing.rules.knobs import EXPERTS, Knob
from bh_routing.rules.mixing import MixingRule
from bh_routing.rules.slots import keep_best


@dataclass(frozen=True)
class PerLayerTopK(MixingRule):
    """Keep k[layer] experts of every token.

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
    """Experts a token in each layer that has a router, first layer first; a list is taken too."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if isinstance(self.k, (str, int)) or not isinstance(self.k, Sequence) or not self.k:
            raise InputError(f"k must be a list with one whole number a layer, got {self.k!r}")
        for layer, k in enumerate(self.k):
            check_count(f"k of layer {layer}", k)
        # A configuration file gives a list, and a rule must be hashable.
        object.__setattr__(self, "k", tuple(self.k))
        super().__post_init__()

    @classmethod
    def at_mean(cls, mean_experts: float, layer_order: Sequence[int]) -> PerLayerTopK:
        """Share out a mean number of experts: k everywhere, k + 1 in the first layers of an order.

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
        """Share out a mean number of experts so that little is lost, if losses of layers add.

        From all experts down, the expert goes whose layer loses least by it, and so on until the
        total is met to within half an expert: optimal where each layer's losses are convex.

        Args:
            mean_experts: mean over layers, at least 1.
            losses_LK: of each layer, the loss if it alone keeps 1, 2, ... K experts.
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
        """Refuse more experts than there are."""
        check_at_most_experts("the largest k", max(self.k), num_experts)

    def bind(self, context: LayerContext) -> Selector:
        """Return the selector of the layer.

        Raises:
            InputError: there is no k for the layer, or a k too many.
        """
        num_layers = context.layer + 1 if context.num_layers is None else context.num_layers
        if len(self.k) < num_layers or (context.num_layers and len(self.k) > num_layers):
            raise InputError(
                f"k has {len(self.k)} entries, the model has {num_layers} layers with a router; "
                "give one for each"
            )
        self.check(num_experts=context.num_experts, model_top_k=context.model_top_k)
        count_11 = torch.full((1, 1), self.k[context.layer], device=context.device)

        def select(candidates: Candidates) -> Tensor:
            return keep_best(candidates, count_11)

        return select
