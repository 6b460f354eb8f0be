"""Quantised checkpoints: two kinds are widened while they are read, the others are refused."""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from bh_routing.errors import ModelError

log = logging.getLogger(__name__)

_WIDENED: Final[dict[str, Any]] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Methods that transformers can undo while it reads, on any device."""


def widening_of(name: str, config: Any) -> dict[str, Any]:
    """Return what `from_pretrained` needs to give a quantised checkpoint plain float weights.

    Args:
        name: the model's, for the error.
        config: the checkpoint's configuration.
    Returns:
        Keyword arguments; none for a checkpoint that isn't quantised.
    Raises:
        ModelError: it is quantised by another method.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return {}
    method = method_of(stored)
    if method not in _WIDENED:
        raise ModelError(
            f"model {name!r} is quantised by {method}; only {' and '.join(_WIDENED)} can be "
            "widened while they are read: use such a checkpoint, or one of float32, bfloat16 or "
            "float16"
        )
    log.info("the weights of %s are stored as %s, and widened while they are read", name, method)
    return {"quantization_config": _WIDENED[method](dequantize=True)}


def widen_what_was_left(model: Any, dtype: torch.dtype) -> None:
    """Bring bfloat16 weights to a float32 model's dtype: older transformers widen no further."""
    for parameter in model.parameters():
        if dtype == torch.float32 and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def method_of(stored: Any) -> str:
    """Return the name of a quantisation method, from a configuration's entry of either form."""
    if isinstance(stored, dict):
        return str(stored.get("quant_method", "an unknown method"))
    method = getattr(stored, "quant_method", "an unknown method")
    return str(getattr(method, "value", method))
