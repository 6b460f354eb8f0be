"""Find the routers of a model, and reject models that can't be routed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from bh_routing.errors import InputError, ModelError
from bh_routing.models.capture import capture_routers, text_config
from bh_routing.models.families import TABLE_CALL, family_of
from bh_routing.models.probe import establish
from bh_routing.models.sites import RouterSite

log = logging.getLogger(__name__)

_WIDENED: Final[dict[str, Any]] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Quantisation methods that transformers can undo on loading, on any device."""


def widening_of(name: str, config: Any) -> dict[str, Any]:
    """Return the arguments for `from_pretrained` that dequantise a checkpoint on loading.

    Args:
        name: name of the model, for the error message.
        config: the checkpoint's configuration.
    Returns:
        Keyword arguments; empty if the checkpoint isn't quantised.
    Raises:
        ModelError: the quantisation method isn't supported.
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
    """Convert remaining bfloat16 weights to float32: older transformers dequantise to bfloat16."""
    for parameter in model.parameters():
        if dtype == torch.float32 and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def method_of(stored: Any) -> str:
    """Return the quantisation method of a configuration entry, a dict or an object."""
    if isinstance(stored, dict):
        return str(stored.get("quant_method", "an unknown method"))
    method = getattr(stored, "quant_method", "an unknown method")
    return str(getattr(method, "value", method))


_CUTS_BEHIND_ROUTERS: Final = Version("5.23")
"""Oldest tested transformers that shards experts after the router, whose output is then whole."""
_UNTRIED: Final = ("pp_size", "fsdp_size", "dp_replicate_size")


def reject_spread_and_quantised(model: Any) -> None:
    """Raise ModelError unless every router sees all experts and weights aren't quantised.

    Supported are layers on different devices, placed by accelerate's device map, and weights
    sharded across processes by transformers' tensor or expert parallelism.
    """
    devices = {str(parameter.device) for parameter in model.parameters()}
    if "meta" in devices:
        raise ModelError(
            "some of the model's weights are on no device (meta); load it without offloading, as "
            "bh_routing.load_model does"
        )
    _reject_other_parallelism(model)
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


def _reject_other_parallelism(model: Any) -> None:
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


_SAMPLED_VALUES = 256
_VOLATILE: Final = frozenset(
    {
        "architectures",
        "dtype",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Settings that don't affect results."""

ROUTED: Final[WeakSet[nn.Module]] = WeakSet()
"""Router modules inside `route` now; a model, its submodules and wrappers have the same ones."""

_known: Final[WeakKeyDictionary[nn.Module, tuple[Routers, list[Any]]]] = WeakKeyDictionary()
"""Routers by model, with the state of the model when they were probed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routers:
    """All routers of a model, which agree in their number of experts and top-k."""

    sites: tuple[RouterSite, ...]
    num_experts: int
    model_top_k: int

    @property
    def most_slots(self) -> int:
        """Largest number of slots that every router supports."""
        return min(site.facts.most_slots for site in self.sites)

    @property
    def is_routed(self) -> bool:
        """Whether any router is inside `route` now."""
        return any(site.module in ROUTED for site in self.sites)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Facts about a model that a results folder records."""

    model_type: str
    num_layers: int
    """Layers with a router."""
    num_experts: int
    model_top_k: int
    dtype: str
    device: str
    fingerprint: str
    num_parameters: int
    context_length: int | None
    """Maximum input length in tokens; None if the configuration doesn't specify one."""


def find_routers(model: nn.Module) -> Routers:
    """Find every router of the text model and probe it.

    The first call runs a short sequence and experiments with each router. The result is cached
    until a router, its experts, or one of its settings or tensors is changed or moved.

    Raises:
        ModelError: the model has no router, isn't supported (its family, quantisation or spread
            over devices), or a fact about a router can't be established.
    """
    model = unwrapped(model)
    known, state = _known.get(model, (None, None))
    if known is not None and (known.is_routed or _state_of(model) == state):
        return known
    reject_routed(model.modules())
    _known.pop(model, None)
    model_type = model_type_of(model)
    family = family_of(model_type)
    reject_spread_and_quantised(model)
    try:
        calls = capture_routers(model)
        sites = tuple(
            RouterSite(
                call.place.name,
                call.place.module,
                call.place.block,
                call.place.experts,
                call.place.order,
                layer,
                establish(call, family),
            )
            for layer, call in enumerate(calls)
            if call.is_finite
        )
        damaged = [call.place.name for call in calls if not call.is_finite]
        routers = None if damaged else _agree(sites)
    except ModelError as error:
        raise ModelError(
            f"model type {model_type!r} can't be routed: {error}; see: {TABLE_CALL}"
        ) from error
    if routers is None:
        raise ModelError(
            f"router {damaged[0]} has or gives NaN or infinite values on a short text; the "
            "checkpoint is damaged or the dtype too narrow: get it again, or load it as float32"
        )
    _known[model] = routers, _state_of(model)
    return routers


def reject_routed(modules: Iterable[nn.Module]) -> None:
    """Raise ModelError if one of the modules is a router inside `route`."""
    if any(module in ROUTED for module in modules):
        raise ModelError(
            "the model's routers are already inside route(), perhaps by a part or a wrapper of the "
            "model; leave that block first"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile`, `DistributedDataParallel` or `DataParallel`.

    Raises:
        InputError, ModelError: `model` isn't a module, or is a DataParallel over several GPUs.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch module, got {type(model).__name__}; give the model that it "
            "holds, such as pipeline.model"
        )
    while True:
        if isinstance(model, DataParallel) and len(model.device_ids) > 1:
            raise ModelError(
                f"DataParallel runs copies of the model on {len(model.device_ids)} GPUs, and only "
                "the model itself can be routed; use one GPU, or DistributedDataParallel"
            )
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        # Not getattr: PEFT's wrappers forward it to the model inside them.
        elif (inner := model._modules.get("_orig_mod")) is not None:
            model = inner
        else:
            return model


def model_type_of(model: nn.Module) -> str:
    """Return the name of the model's family."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _agree(sites: tuple[RouterSite, ...]) -> Routers:
    if not sites:
        raise ModelError(
            "no mixture-of-experts router was found on the way of a text; give a model that mixes "
            "experts, such as demo"
        )
    for what in ("num_experts", "top_k"):
        values = sorted({getattr(site.facts, what) for site in sites})
        if len(values) > 1:
            raise ModelError(f"its layers differ in {what} ({', '.join(map(str, values))})")
    return Routers(
        sites=sites, num_experts=sites[0].facts.num_experts, model_top_k=sites[0].facts.top_k
    )


def _state_of(model: nn.Module) -> list[Any]:
    """Collect all state of a model's blocks with experts that routing can depend on.

    Tensor values aren't read: a tensor counts as changed if it was written to or moved.
    """
    state: list[Any] = []
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module):
            continue
        children = [child for child in block.children() if child is not experts]
        state.append((name, experts))
        for part in (block, *(module for child in children for module in child.modules())):
            for owner in (part, getattr(part, "config", None)):
                state.append((owner, _settings_of(owner)))
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                state.append(None if tensor is None else _place_of(tensor))
    return state


def _settings_of(owner: Any) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, value in getattr(owner, "__dict__", {}).items()
        if name == "forward"
        or (
            isinstance(value, bool | int | float | str | None)
            and name != "training"
            and not name.startswith("_")
        )
    ]


def _place_of(tensor: Tensor) -> tuple[Any, ...]:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    version = 0 if local.is_inference() else local._version
    return (local.data_ptr(), version, local.device, local.dtype, local.shape)


def describe_model(model: nn.Module) -> ModelFacts:
    """Collect the facts about a model that results and calibrations are checked against."""
    routers = find_routers(model)
    parameter = next(model.parameters())
    config = getattr(model, "config", None)
    context = getattr(text_config(model), "max_position_embeddings", None)
    return ModelFacts(
        model_type=str(getattr(config, "model_type", "")),
        num_layers=len(routers.sites),
        num_experts=routers.num_experts,
        model_top_k=routers.model_top_k,
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=parameter.device.type,
        fingerprint=model_fingerprint(model),
        num_parameters=sum(p.numel() for p in model.parameters()),
        context_length=int(context) if context else None,
    )


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Hash the configuration, and the names, shapes and evenly spaced values of all weights.

    The hash covers 256 float32 values of each parameter and saved buffer: it may miss a change to
    a single weight, but distinguishes other checkpoints and fine-tuned ones. Buffers are included
    because a router's correction bias is one; unsaved buffers follow from the configuration. The
    hash is independent of the device, but not of the dtype.
    """
    model = unwrapped(model)
    digest = hashlib.sha256(_plain_json(model_settings(model)["config"]).encode())
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    for name, parameter in sorted([*model.named_parameters(), *buffers], key=lambda item: item[0]):
        # A sharded parameter is gathered on every process.
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        flat = whole.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED_VALUES)
        values = flat[::step][:_SAMPLED_VALUES].float().cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def model_settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the model's config and generation_config as plain JSON, without volatile settings.

    Volatile settings are the files' origin and versions, additional outputs of a forward pass, and
    the dtype, which the weights have. All others are kept, because only the family's code knows
    which of them affect the computation.
    """
    model = unwrapped(model)
    found = {name: getattr(model, name, None) for name in ("config", "generation_config")}
    return {name: {} if own is None else _lasting(own.to_dict()) for name, own in found.items()}


def _lasting(value: Any) -> Any:
    """Drop unset, private and volatile entries at every depth; NaN and infinity become texts."""
    if not isinstance(value, Mapping):
        return json.loads(_plain_json(value), parse_constant=str)
    return {
        str(key): _lasting(entry)
        for key, entry in value.items()
        if entry is not None and not str(key).startswith("_") and key not in _VOLATILE
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash everything that determines a tokenizer's encoding and decoding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    # Left out: set by the last call that padded or truncated.
    does = {key: value for key, value in whole.items() if key not in ("padding", "truncation")}
    text = _plain_json([type(tokenizer).__name__, tokenizer.special_tokens_map, does])
    return hashlib.sha256(text.encode()).hexdigest()


def _plain_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
