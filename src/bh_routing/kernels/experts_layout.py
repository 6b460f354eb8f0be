"""One view of the expert weights of every family: (E, out, in), whatever way they are stored.

Axes: E experts, H hidden, F expert hidden, N rows of the first projection (2F gated, else F).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from bh_routing.errors import ModelError

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


class ExpertWeights(NamedTuple):
    """The two projections of all experts of a layer, and what happens between and after them."""

    up: Tensor
    """(E, N, H). A transposed layout comes as a transposed view, never as a copy."""
    up_bias: Tensor | None
    """(E, N)."""
    down: Tensor
    """(E, H, F)."""
    down_bias: Tensor | None
    """(E, H)."""
    is_silu_gated: bool
    """The first F rows of `up` are the gate, the step between is silu(gate) * up, and no bias."""
    activate: Callable[[Tensor], Tensor]
    """The family's own step between the projections, (..., N) -> (..., F)."""
    normalize: Callable[[Tensor], Tensor] | None
    """A norm on each expert's output, before its weight; most families have none."""


def read_experts(experts: Any) -> ExpertWeights:
    """Read a module that follows transformers' experts interface.

    Raises:
        ModelError: the weights are stored in a dtype no kernel here multiplies (quantised ones).
    """
    # Not every supported version of transformers sets every flag; its defaults are these.
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
    """Whether the GPU is one of NVIDIA's since Hopper: large shared memory, dependent launches."""
    return (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (9, 0)
    )


def _is_silu_gated(experts: Any) -> bool:
    # Names that transformers may change: then the family's own gate runs, slower and as right.
    return (
        type(experts)._apply_gate.__name__ == "_default_apply_gate"
        and getattr(experts, "is_concatenated", True)
        and type(experts.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )
