"""Sparse experts, which compute kept slots only, in plain torch or with a Triton kernel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear

from bh_routing.errors import ModelError

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


class ExpertWeights(NamedTuple):
    """Both projections of all experts of a layer, with the activation and output norm."""

    up: Tensor
    """(E, N, H); a transposed layout is given as a view, never as a copy."""
    up_bias: Tensor | None
    """(E, N)."""
    down: Tensor
    """(E, H, F)."""
    down_bias: Tensor | None
    """(E, H)."""
    is_silu_gated: bool
    """Whether the activation is silu(gate) * up, with the gate in the first F rows, and no bias."""
    activate: Callable[[Tensor], Tensor]
    """The family's activation between the projections, (..., N) -> (..., F)."""
    normalize: Callable[[Tensor], Tensor] | None
    """Norm of each expert's output, before weighting; None in most families."""


def read_experts(experts: Any) -> ExpertWeights:
    """Read the weights of a module with transformers' experts interface.

    Raises:
        ModelError: the weights' dtype isn't supported, for example because they are quantised.
    """
    # Not every supported version of transformers sets every flag; these are its defaults.
    has_gate = getattr(experts, "has_gate", True)
    name = "gate_up_proj" if has_gate else "up_proj"
    up, down = getattr(experts, name), experts.down_proj
    if up.dtype not in DTYPES:
        raise ModelError(
            f"expert weights are {up.dtype}; sparse experts take bfloat16, float16 or float32: "
            "load the model unquantised, or leave its experts implementation as it is"
        )
    if getattr(experts, "is_transposed", False):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    has_bias = getattr(experts, "has_bias", False)
    has_norm = getattr(experts, "has_post_expert_norm", False)
    return ExpertWeights(
        up=up,
        up_bias=getattr(experts, f"{name}_bias") if has_bias else None,
        down=down,
        down_bias=experts.down_proj_bias if has_bias else None,
        is_silu_gated=has_gate and not has_bias and _is_silu_gated(experts),
        activate=experts._apply_gate if has_gate else experts.act_fn,
        normalize=experts.post_expert_norm if has_norm else None,
    )


def runs_on_hopper() -> bool:
    """Whether the GPU is NVIDIA Hopper or newer: large shared memory, dependent launches."""
    return (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (9, 0)
    )


def _is_silu_gated(experts: Any) -> bool:
    # If transformers renames these, the family's own activation runs: slower, but equivalent.
    return (
        type(experts)._apply_gate.__name__ == "_default_apply_gate"
        and getattr(experts, "is_concatenated", True)
        and type(experts.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )


MOST_GATHERED: Final = 64
"""Kept slots up to which copying each slot's weights is faster than a grouped product.

Measured on two CPU cores with the demo model (64 experts, 128 x 64).
"""


TOKENS_AT_A_TIME: Final = 2048
"""On a CPU: the allocator maps larger results anew each time, which halved the speed."""


def mix_torch(
    experts: ExpertWeights, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Mix the kept experts of each token.

    Args:
        experts: the layer's weights.
        hidden_TH: (T, H).
        index_TK: integer, (T, K); a slot with an index >= E counts as dropped.
        weights_TK: (T, K); exactly 0 where a slot was dropped.
    Returns:
        (T, H), in the dtype of `hidden_TH`.
    """
    if len(hidden_TH) > TOKENS_AT_A_TIME and not hidden_TH.is_cuda:
        split = [rows.split(TOKENS_AT_A_TIME) for rows in (hidden_TH, index_TK, weights_TK)]
        return torch.cat([mix_torch(experts, *part) for part in zip(*split, strict=True)])
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
    # Scatter, then sum: on a GPU the order of `index_add_` isn't deterministic.
    # Kept slots to the left: a widened router proposes more than a token keeps.
    place_S = (kept_TK.cumsum(-1) - 1)[token_S, slot_S]
    most = int(place_S.max()) + 1 if place_S.numel() else 0
    weighted_TKH = weighted_SH.new_zeros(len(hidden_TH), most, weighted_SH.shape[1])
    weighted_TKH[token_S, place_S] = weighted_SH
    return weighted_TKH.sum(1).to(hidden_TH.dtype)


def mix_one(
    experts: ExpertWeights, hidden_1H: Tensor, expert_S: Tensor, weights_S: Tensor
) -> Tensor:
    """Mix the kept experts of a single token, with one product for all first projections.

    Args:
        experts: the layer's weights.
        hidden_1H: (1, H).
        expert_S: kept experts, integer, (S,).
        weights_S: their weights, (S,).
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
    # On a CPU `weight[expert_S]` is eight times slower.
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
    # torch's grouped product requires rows aligned to 16 bytes.
    _, rows, hidden = experts.up.shape
    sizes = (rows, hidden, experts.down.shape[2])
    return all(size * experts.up.element_size() % 16 == 0 for size in sizes)


NAME: Final = "bh_sparse"
"""Name under which the function is registered in transformers."""
MOST_FEW_TOKENS: Final = 8
"""Tokens up to which every slot reads its expert separately; above, tokens share reads.

Measured on one H100 with OLMoE-1B-7B's experts: 6 tokens take 154 us against 160 us, 8 take 185
against 187, 12 take 238 against 226.
"""

# Triton is optional, and experts_triton requires it.
_TRITON: Final[Any] = (
    import_module("bh_routing.kernels.experts_triton") if find_spec("triton") else None
)


def sparse_experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Mix the kept experts of each token, as the model's own loop does up to rounding.

    On a GPU it makes no host sync, is deterministic, and can be captured in a CUDA graph. If
    gradients are required or Triton isn't available, plain torch runs.

    Args:
        experts: an unquantised module with transformers' experts interface.
        hidden_states: (T, H).
        top_k_index: integer, (T, K).
        top_k_weights: (T, K); exactly 0 where a slot was dropped.
    Returns:
        (T, H), in the dtype of `hidden_states`.
    Raises:
        ModelError: the experts' weights are quantised.
    """
    weights = read_experts(experts)
    if _TRITON is None or not hidden_states.is_cuda or _wants_gradient(weights, hidden_states):
        return mix_torch(weights, hidden_states, top_k_index, top_k_weights)
    is_few = hidden_states.shape[0] <= MOST_FEW_TOKENS and weights.normalize is None
    mix = _TRITON.mix_few if is_few else _TRITON.mix_grouped
    # Triton launches on the current device, which may differ from the layer's.
    is_compiling = torch.compiler.is_compiling()
    with nullcontext() if is_compiling else torch.cuda.device_of(hidden_states):
        mixed: Tensor = mix(weights, hidden_states, top_k_index, top_k_weights)
    return mixed


def _wants_gradient(weights: ExpertWeights, hidden_states: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden_states.requires_grad or weights.up.requires_grad)
