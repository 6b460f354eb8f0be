"""Models that are refused whatever their family: cut across processes, or quantised."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from bh_routing.errors import ModelError


def refuse_spread_and_quantised(model: Any) -> None:
    """Raise ModelError if the weights aren't plain and whole.

    Whole layers may be on devices of their own, as accelerate's device map puts them.
    """
    devices = {str(parameter.device) for parameter in model.parameters()}
    if "meta" in devices:
        raise ModelError(
            "some of the model's weights are on no device (meta); load it without offloading, as "
            "bh_routing.load_model does"
        )
    is_cut = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if is_cut or any(_is_expert_parallel(module) for module in model.modules()):
        raise ModelError(
            "the model's experts are cut across processes (tensor or expert parallel), where a "
            "slot can't be pruned yet; load it without tp_plan and without torchrun, with "
            "device_map='auto' if it is larger than one GPU"
        )
    if len(devices) > 1 and not hasattr(model, "hf_device_map"):
        raise ModelError(
            f"the model's weights are on {', '.join(sorted(devices))}, and nothing moves hidden "
            "states between them; load it with device_map='auto', or on one device"
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
