"""BH routing as one function of router logits, for those who have no model at hand.

Axes: E experts, K = max_k slots; leading axes are free.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.catalog import check_router_logits
from bh_routing.rules.base import Candidates, LayerContext
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.fields import check_choice
from bh_routing.rules.weights import kept_weights

FunctionalWeights = Literal["raw", "model", "renormalize", "preserve_mass"]


class RoutedExperts(NamedTuple):
    """What `benjamini_hochberg_routing` returns."""

    weights: Tensor
    """(..., max_k), the logits' dtype, 0 where nothing was selected."""
    experts: Tensor
    """(..., max_k), int64, by logit, largest first; -1 where nothing was selected."""
    counts: Tensor
    """(...), int64: experts selected, from min_k to max_k."""


def benjamini_hochberg_routing(
    router_logits: Tensor,
    alpha: float = 0.05,
    temperature: float = 1.0,
    min_k: int = 1,
    max_k: int = 8,
    null: str = "gaussian",
    *,
    table: ReferenceTable | None = None,
    weights: FunctionalWeights = "raw",
) -> RoutedExperts:
    """Select each token's experts by Benjamini-Hochberg and weigh them by softmax.

    Args:
        router_logits: finite logits of any floating dtype, shape (..., E).
        alpha: target false discovery rate under the null, in (0, 1).
        temperature: divides the logits, above 0.
        min_k: fewest experts a token gets.
        max_k: most experts a token gets, at most E.
        null: what the p-values rest on.
        table: the layer's reference, for a null that needs one.
        weights: "raw" gives softmax(logits / T) of the selected experts as it is; "model" shares
            the mass they have at T = 1; "renormalize" makes them sum to 1; "preserve_mass" to
            what the best max_k experts sum to at T = 1.
    Returns:
        Weights and experts, padded to max_k, and counts.
    Raises:
        InputError: a value out of range, or logits that are NaN or infinite.
        CalibrationError: the null needs a table and none was given.
    Example:
        >>> logits = torch.tensor([9.0, 0.3, -0.2, 8.0, 0.1, -0.4, 0.2, -0.1])
        >>> benjamini_hochberg_routing(logits, max_k=4).experts.tolist()
        [0, 3, -1, -1]
    """
    rule = BenjaminiHochberg(
        alpha=alpha, temperature=temperature, min_k=min_k, max_k=max_k, null=null
    )
    check_choice("weights", weights, get_args(FunctionalWeights))
    check_router_logits(router_logits)
    num_experts = router_logits.shape[-1]
    context = LayerContext(
        layer=0,
        num_experts=num_experts,
        model_top_k=max_k,
        device=router_logits.device,
        table=table,
    )
    select = rule.bind(context)
    flat_TE = router_logits.reshape(-1, num_experts)
    candidates = _propose(flat_TE, max_k)
    keep_TK = select(candidates)
    experts_TK = candidates.top_k_index_TK.masked_fill(~keep_TK, -1)
    weights_TK = _weigh(candidates, keep_TK, temperature, weights)
    leading = router_logits.shape[:-1]
    return RoutedExperts(
        weights_TK.to(router_logits.dtype).reshape(*leading, max_k),
        experts_TK.reshape(*leading, max_k),
        keep_TK.sum(dim=-1).reshape(leading),
    )


def _propose(router_logits_TE: Tensor, num_slots: int) -> Candidates:
    """The best slots with their softmax weights, as a router that doesn't renormalise."""
    # float64 stays: its weights are then as exact as its logits.
    logits_TE = router_logits_TE.to(torch.promote_types(router_logits_TE.dtype, torch.float32))
    # A stable sort, not topk: ties go to the lower expert on every device.
    index_TK = logits_TE.argsort(dim=-1, descending=True, stable=True)[:, :num_slots]
    return Candidates(
        router_logits_TE=logits_TE,
        top_k_index_TK=index_TK,
        top_k_weights_TK=logits_TE.softmax(dim=-1).gather(-1, index_TK),
    )


def _weigh(
    candidates: Candidates, keep_TK: Tensor, temperature: float, weights: FunctionalWeights
) -> Tensor:
    if weights == "raw":
        tempered_TE = (candidates.router_logits_TE / temperature).softmax(dim=-1)
        raw_TK = tempered_TE.gather(-1, candidates.top_k_index_TK)
        return raw_TK.masked_fill(~keep_TK, 0.0)
    return kept_weights(
        candidates.top_k_weights_TK,
        keep_TK,
        convention=weights,
        normalises=False,
        temperature=temperature,
        router_logits_TE=candidates.router_logits_TE,
        top_k_index_TK=candidates.top_k_index_TK,
        model_top_k=keep_TK.shape[-1],
    )
