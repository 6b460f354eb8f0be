"""Models that are refused whatever their family: spread over devices, or quantised."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from bh_routing.errors import ModelError


def refuse_spread_and_quantised(model: Any) -> None:
    """Raise ModelError if the weights aren't plain tensors on one device."""
    devices = {str(parameter.device) for parameter in model.parameters()}
    if "meta" in devices:
        raise ModelError(
            "some of the model's weights are on no device (meta); load it without offloading, as "
            "bh_routing.load_model does"
        )
    is_spread = len(devices) > 1 or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )
    if is_spread or any(_is_expert_parallel(module) for module in model.modules()):
        raise ModelError(
            "the model is spread over several devices (expert-parallel or sharded), where a slot "
            "can't be pruned yet; load it on one device, without device_map or tp_plan"
        )
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is not None or getattr(model, "is_quantized", False):
        raise ModelError(
            f"the model is quantised ({_method_of(quantization)}), which was not tried; load "
            "weights of float32, bfloat16 or float16"
        )


def _is_expert_parallel(module: nn.Module) -> bool:
    return bool(getattr(module, "_is_expert_parallel", False))


def _method_of(quantization: Any) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method", "unknown method"))
    method = getattr(quantization, "quant_method", "unknown method")
    return str(getattr(method, "value", method))
