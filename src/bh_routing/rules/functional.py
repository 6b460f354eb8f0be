"""BH routing as one function of router logits, without a model.

Axes: E experts, K slots; leading axes are arbitrary.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.catalog import check_router_logits
from bh_routing.rules.base import (
    LayerContext,
    TemperatureWeights,
    WeightConvention,
    check_at_most_experts,
    check_count,
)
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.router import SoftmaxFamily, Weighing

OLMOE_TOP_K: Final = 8
"""Default of the model's own k if neither it nor max_k is given."""


class RoutedExperts(NamedTuple):
    """Experts and weights returned by `benjamini_hochberg_routing`."""

    weights: Tensor
    """(..., K), the logits' dtype, 0 in unused slots."""
    experts: Tensor
    """(..., K), int64, by logit, largest first; -1 in unused slots."""
    counts: Tensor
    """(...), int64: selected experts, from min_k to max_k."""


def benjamini_hochberg_routing(
    router_logits: Tensor,
    alpha: float = 0.05,
    temperature: float = 1.0,
    min_k: int = 1,
    max_k: int | None = None,
    null: str | None = None,
    *,
    model_top_k: int | None = None,
    table: ReferenceTable | None = None,
    weights: WeightConvention = "model",
    temperature_weights: TemperatureWeights = "mass",
) -> RoutedExperts:
    """Select each token's experts by Benjamini-Hochberg and weight them by softmax.

    Args:
        router_logits: finite logits of any floating dtype, shape (..., E).
        alpha: target false discovery rate under the null, in (0, 1).
        temperature: divides the logits, above 0.
        min_k: fewest experts per token.
        max_k: most experts per token, at most E; None: the model's own k.
        null: the null distribution of the p-values; None: the default of `BenjaminiHochberg` if
            there is a table, else "gaussian", which needs none.
        model_top_k: the model's own k, at most E; None: max_k, or 8 if max_k is None too.
        table: the layer's reference table, for a null that needs one.
        weights: "model" keeps the softmax weights; the others scale their sum: "renormalize" to 1,
            "preserve_mass" to the sum of the model's own k best experts at temperature 1.
        temperature_weights: at another temperature, "mass" keeps the selected experts' sum at
            temperature 1; "raw" gives softmax(logits / temperature) unchanged.
    Returns:
        Weights and experts, padded to K = the larger of max_k and the model's own k, and counts.
    Raises:
        InputError: a value is out of range, or logits are NaN or infinite.
        CalibrationError: the null needs a table and none was given.
    Example:
        >>> logits = torch.tensor([9.0, 0.3, -0.2, 8.0, 0.1, -0.4, 0.2, -0.1])
        >>> benjamini_hochberg_routing(logits, max_k=4).experts.tolist()
        [0, 3, -1, -1]
    """
    if null is None:
        null = "gaussian" if table is None else BenjaminiHochberg.null
    rule = BenjaminiHochberg(
        alpha=alpha,
        temperature=temperature,
        min_k=min_k,
        max_k=max_k,
        null=null,
        weights=weights,
        temperature_weights=temperature_weights,
    )
    check_router_logits(router_logits)
    num_experts = router_logits.shape[-1]
    if model_top_k is None:
        model_top_k = OLMOE_TOP_K if max_k is None else max_k
    else:
        check_count("model_top_k", model_top_k)
        check_at_most_experts("model_top_k", model_top_k, num_experts)
    context = LayerContext(
        layer=0,
        num_experts=num_experts,
        model_top_k=model_top_k,
        device=router_logits.device,
        table=table,
    )
    select = rule.bind(context)
    num_slots = rule.num_candidates(model_top_k)
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    family = SoftmaxFamily(normalises=False, weights_dtype=dtype)
    candidates = family.propose(router_logits.reshape(-1, num_experts), num_slots)
    keep_TK = select(candidates)
    experts_TK = candidates.top_k_index_TK.masked_fill(~keep_TK, -1)
    weighing = Weighing.of(rule, normalises=False, model_top_k=model_top_k)
    weights_TK = weighing.weights(candidates, keep_TK)
    leading = router_logits.shape[:-1]
    return RoutedExperts(
        weights_TK.to(router_logits.dtype).reshape(*leading, num_slots),
        experts_TK.reshape(*leading, num_slots),
        keep_TK.sum(dim=-1).reshape(leading),
    )
