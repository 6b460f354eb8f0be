"""Sparse experts in plain torch: kept slots only, no Python loop over experts, any device.

What the kernels are tested against on a GPU, what runs on a CPU, and what runs where a gradient is
wanted. On a GPU it waits for the device once a layer, to learn how many slots were kept.

Axes: T tokens, K slots, S kept slots, E experts, H hidden, F expert hidden, N rows of `up`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from bh_routing.kernels.experts_layout import ExpertWeights

MOST_GATHERED: Final = 64
"""Kept slots up to which a copy of each slot's weights is quicker than visiting all experts.

Measured on two CPU cores with the demo model (64 experts, 128 x 64).
"""


def mix_torch(
    experts: ExpertWeights, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Mix the kept experts of each token.

    Args:
        experts: the layer's weights.
        hidden_TH: (T, H).
        index_TK: integer, (T, K); a slot that names no expert (>= E) counts as dropped.
        weights_TK: (T, K); exactly 0 where a slot was dropped.
    Returns:
        (T, H), in the dtype of `hidden_TH`.
    """
    kept_TK = (weights_TK != 0) & (index_TK < experts.up.shape[0])
    if len(hidden_TH) == 1:
        return mix_one(experts, hidden_TH, index_TK[kept_TK], weights_TK[kept_TK])
    token_S, slot_S = kept_TK.nonzero(as_tuple=True)
    expert_S = index_TK[token_S, slot_S]
    is_gathered = expert_S.numel() <= MOST_GATHERED or not _can_group(experts)
    if not is_gathered:
        expert_S, order_S = expert_S.sort(stable=True)
        token_S, slot_S = token_S[order_S], slot_S[order_S]
    multiply = _gathered_linear if is_gathered else _grouped_linear
    inputs_SH = hidden_TH[token_S].to(experts.up.dtype)
    inner_SF = experts.activate(multiply(inputs_SH, experts.up, experts.up_bias, expert_S))
    outputs_SH = multiply(inner_SF, experts.down, experts.down_bias, expert_S)
    if experts.normalize is not None:
        outputs_SH = experts.normalize(outputs_SH)
    weighted_SH = outputs_SH * weights_TK[token_S, slot_S].unsqueeze(-1)
    # Placed, then summed: on a GPU `index_add_` adds in another order each time.
    weighted_TKH = weighted_SH.new_zeros(*kept_TK.shape, weighted_SH.shape[1])
    weighted_TKH[token_S, slot_S] = weighted_SH
    return weighted_TKH.sum(1).to(hidden_TH.dtype)


def mix_one(
    experts: ExpertWeights, hidden_1H: Tensor, expert_S: Tensor, weights_S: Tensor
) -> Tensor:
    """Mix the kept experts of a single token: all their first projections are one product.

    Args:
        experts: the layer's weights.
        hidden_1H: (1, H).
        expert_S: the kept ones, integer, (S,).
        weights_S: (S,).
    Returns:
        (1, H), in the dtype of `hidden_1H`.
    """
    up_SNH = experts.up.index_select(0, expert_S)
    inner_SN = linear(hidden_1H.to(up_SNH.dtype), up_SNH.flatten(0, 1)).view(up_SNH.shape[:2])
    if experts.up_bias is not None:
        inner_SN = inner_SN + experts.up_bias[expert_S]
    inner_SF = experts.activate(inner_SN)
    outputs_SH = _gathered_linear(inner_SF, experts.down, experts.down_bias, expert_S)
    if experts.normalize is not None:
        outputs_SH = experts.normalize(outputs_SH)
    return (outputs_SH * weights_S.unsqueeze(-1)).sum(0, keepdim=True).to(hidden_1H.dtype)


def _gathered_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, expert_S: Tensor
) -> Tensor:
    # On a CPU `weight[expert_S]` takes eight times as long.
    chosen = weight.index_select(0, expert_S)
    outputs = torch.bmm(inputs.unsqueeze(1), chosen.transpose(1, 2)).squeeze(1)
    return outputs if bias is None else outputs + bias[expert_S]


def _grouped_linear(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, expert_S: Tensor
) -> Tensor:
    ends_E = torch.bincount(expert_S, minlength=weight.shape[0]).cumsum(0).int()
    outputs: Tensor = grouped_mm(inputs, weight.transpose(1, 2), offs=ends_E)
    return outputs if bias is None else outputs + bias[expert_S]


def _can_group(experts: ExpertWeights) -> bool:
    # torch's grouped product wants rows that start on 16 bytes.
    _, rows, hidden = experts.up.shape
    sizes = (rows, hidden, experts.down.shape[2])
    return all(size * experts.up.element_size() % 16 == 0 for size in sizes)
