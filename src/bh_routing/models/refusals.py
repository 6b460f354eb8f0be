"""Models that are refused whatever their family: spread in a way unknown to us, or quantised."""

from __future__ import annotations

from typing import Any, Final

import transformers
from packaging.version import Version

from bh_routing.errors import ModelError
from bh_routing.models.quantised import method_of

_CUTS_BEHIND_ROUTERS: Final = Version("5.23")
"""The oldest transformers seen to cut experts behind the router's answer, which is then whole."""
_UNTRIED: Final = ("pp_size", "fsdp_size", "dp_replicate_size")


def refuse_spread_and_quantised(model: Any) -> None:
    """Raise ModelError unless every router sees all experts and weights are plain numbers.

    Whole layers may be on devices of their own, as accelerate's device map puts them, and
    weights may be cut across processes by transformers' tensor or expert parallelism.
    """
    devices = {str(parameter.device) for parameter in model.parameters()}
    if "meta" in devices:
        raise ModelError(
            "some of the model's weights are on no device (meta); load it without offloading, as "
            "bh_routing.load_model does"
        )
    _refuse_other_parallelism(model)
    if len(devices) > 1 and not hasattr(model, "hf_device_map"):
        raise ModelError(
            f"the model's weights are on {', '.join(sorted(devices))}, and nothing moves hidden "
            "states between them; load it with device_map='auto', or on one device"
        )
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is not None or getattr(model, "is_quantized", False):
        raise ModelError(
            f"the model's weights are quantised ({method_of(quantization)}), which was not tried; "
            "load it with bh_routing.load_model, which widens fp8 and mxfp4, or load weights of "
            "float32, bfloat16 or float16"
        )


def _refuse_other_parallelism(model: Any) -> None:
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    is_cut = config is not None or (getattr(model, "tp_size", None) or 1) > 1
    if is_cut and Version(transformers.__version__) < _CUTS_BEHIND_ROUTERS:
        raise ModelError(
            f"the model is cut across processes, which transformers {transformers.__version__} "
            f"may do before its routers answer; use transformers {_CUTS_BEHIND_ROUTERS} or newer"
        )
    untried = [name for name in _UNTRIED if (getattr(config, name, None) or 1) > 1]
    if untried:
        raise ModelError(
            f"the model is spread over processes by {', '.join(untried)}, which was not tried; use "
            "tensor or expert parallelism (tp_size, ep_size), or device_map='auto'"
        )
