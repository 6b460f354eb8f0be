"""Find the routers of a model, and say what kind of model it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from bh_routing.errors import ModelError
from bh_routing.models.families import Family, family_of

_SAMPLED_VALUES = 256


@dataclass(frozen=True, slots=True)
class RouterSite:
    """One mixture-of-experts layer's router."""

    name: str
    module: nn.Module
    layer: int
    """0 for the first layer that has a router, counting only such layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routers:
    """All routers of a model; they share one number of experts and one top-k."""

    sites: tuple[RouterSite, ...]
    family: Family
    num_experts: int
    model_top_k: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a results folder keeps of a model."""

    model_type: str
    num_layers: int
    """Layers that have a router."""
    num_experts: int
    model_top_k: int
    dtype: str
    device: str
    fingerprint: str
    num_parameters: int
    context_length: int | None
    """Longest input the configuration allows, in tokens; None if it doesn't say."""


def find_routers(model: nn.Module) -> Routers:
    """Find every router by structure: a block with `.experts` and a `.gate` or `.router`.

    Raises:
        ModelError: the model has no router, or its family isn't supported.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    sites: list[RouterSite] = []
    for name, block in model.named_modules():
        for attribute in ("gate", "router"):
            router = getattr(block, attribute, None)
            if isinstance(getattr(block, "experts", None), nn.Module) and isinstance(
                router, nn.Module
            ):
                sites.append(RouterSite(f"{name}.{attribute}", router, len(sites)))
    if not sites:
        raise ModelError(
            f"model type {model_type!r} has no mixture-of-experts router; give a model that "
            "mixes experts, for example --model demo"
        )
    family = family_of(model_type)
    first = sites[0].module
    return Routers(
        sites=tuple(sites),
        family=family,
        num_experts=int(getattr(first, "num_experts")),  # noqa: B009  # typed as Tensor | Module
        model_top_k=int(getattr(first, family.top_k_attribute)),
    )


def describe_model(model: nn.Module) -> ModelFacts:
    """Collect the facts that results and calibrations are checked against."""
    routers = find_routers(model)
    parameter = next(model.parameters())
    config = getattr(model, "config", None)
    context = getattr(config, "max_position_embeddings", None)
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
    """Hash names, shapes and evenly spaced values of all parameters.

    256 values of each parameter in float32: a change of any one weight may go unseen, another
    checkpoint or a fine-tuned one never does. The same on every device; not on every dtype.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLED_VALUES)
        values = flat[::step][:_SAMPLED_VALUES].float().cpu().contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
