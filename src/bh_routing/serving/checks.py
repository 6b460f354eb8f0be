"""Whether a loaded vLLM model, and the server's settings, can be combined with a rule."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
import vllm
from torch import Tensor, nn
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from bh_routing.errors import InputError, ModelError
from bh_routing.serving.config import VARIABLE, ServedRule, check_fit, check_version

_UNTRIED: Final = (
    *("data_parallel_size", "pipeline_parallel_size", "ubatch_size"),
    *("decode_context_parallel_size", "prefill_context_parallel_size"),
)
"""Sizes that must be 1."""
_NO_RULE: Final = f"serve the model without a rule: unset {VARIABLE}"
_TRIAL_TOKENS: Final = 32


class MoELayer(NamedTuple):
    """One mixture-of-experts layer of a loaded model."""

    name: str
    module: Any
    router: Any
    gate: nn.Module | None
    """The linear layer that computes the router logits."""


def check_engine(vllm_config: Any) -> None:
    """Raise InputError if a setting of the server can't be combined with a rule."""
    check_version(vllm.__version__)
    parallel = vllm_config.parallel_config
    if parallel.enable_expert_parallel:
        raise InputError(
            "expert parallelism marks experts of other ranks by the id -1, which is untested "
            "with a rule; leave out --enable-expert-parallel"
        )
    untried = [name for name in _UNTRIED if (getattr(parallel, name, None) or 1) > 1]
    untried += ["enable_dbo"] * bool(getattr(parallel, "enable_dbo", False))
    untried += ["speculative_config"] * (vllm_config.speculative_config is not None)
    untried += ["enable_lora"] * (vllm_config.lora_config is not None)
    if untried:
        flag = f"--{untried[0].replace('_', '-')}"
        raise InputError(f"{flag} was not tried with a rule; leave it out")


def find_layers(model: nn.Module) -> list[MoELayer]:
    """Return the mixture-of-experts layers of a vLLM model, in order.

    Raises:
        ModelError: there is none.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        router = getattr(module, "router", None)
        if not isinstance(router, BaseRouter):
            continue
        parent = modules[name.rpartition(".")[0]]
        near = [getattr(module, "gate", None), *parent.children()]
        gates = [
            each for each in near if getattr(each, "output_size", None) == router.global_num_experts
        ]
        found.append(MoELayer(name, module, router, gates[0] if gates else None))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no mixture-of-experts layer with a router; {_NO_RULE}"
        )
    return found


def check_model(model: nn.Module, vllm_config: Any, layers: list[MoELayer]) -> None:
    """Raise ModelError if a router of the model isn't supported."""
    config = vllm_config.model_config.hf_text_config
    if config.model_type == "olmoe" and getattr(config, "tie_word_embeddings", False):
        raise ModelError(
            "vLLM ignores tie_word_embeddings of OLMoE and would generate noise; start it by "
            "bh-routing serve, which serves an untied copy"
        )
    for layer in layers:
        experts = getattr(layer.module, "routed_experts", layer.module)
        if experts.quant_method.is_monolithic:
            raise ModelError(
                f"{layer.name} runs a kernel that routes by itself, so no rule can be applied; "
                "start vLLM with --moe-backend triton"
            )
        if reason := _why_not_plain(layer, config):
            raise ModelError(
                f"{layer.name}: {reason}, and rules apply to the k largest of a softmax; {_NO_RULE}"
            )


def _why_not_plain(layer: MoELayer, config: Any) -> str:
    router = layer.router
    kind = type(router).__name__
    if kind not in ("FusedTopKRouter", "CPURouter"):
        return f"its router is vLLM's {kind}"
    if router.scoring_func != "softmax":
        return f"its router scores by {router.scoring_func}"
    for name in ("use_grouped_topk", "custom_routing_function", "e_score_correction_bias"):
        if getattr(router, name, None) not in (None, False):
            return f"its router has {name}"
    if getattr(layer.module, "routed_scaling_factor", 1.0) != 1.0:
        return f"its router scales weights by {layer.module.routed_scaling_factor}"
    wanted = getattr(config, "norm_topk_prob", None)
    if wanted is not None and bool(wanted) != bool(router.renormalize):
        return f"norm_topk_prob is {wanted}, and vLLM's router has renormalize={router.renormalize}"
    return ""


def check_rules(served: ServedRule, layers: list[MoELayer]) -> None:
    """Raise InputError or CalibrationError if a rule or the calibration doesn't fit the layers."""
    sizes = {(layer.router.global_num_experts, layer.router.top_k) for layer in layers}
    if len(sizes) > 1:
        raise ModelError(f"layers differ in experts and top k: {sorted(sizes)}; {_NO_RULE}")
    ((num_experts, top_k),) = sizes
    gates = [] if served.calibration is None else [_gate_of(layer) for layer in layers]
    check_fit(served, gates, num_experts=num_experts, model_top_k=top_k)


def _gate_of(layer: MoELayer) -> tuple[Tensor, Tensor | None]:
    if layer.gate is None:
        raise ModelError(
            f"the router weights of {layer.name} weren't found, so the calibration can't be "
            "compared with the model; choose a rule without calibration"
        )
    gate: Any = layer.gate
    weight_EH: Tensor = gate.weight
    if weight_EH.numel() == 0:
        # vLLM repacks a CPU's weights. Products with 0 and 1 return them exactly.
        eye_HH = torch.eye(gate.input_size, dtype=weight_EH.dtype)
        weight_EH = gate(eye_HH)[0].T
    return weight_EH, gate.bias


@torch.inference_mode()
def check_finite(model: nn.Module, vllm_config: Any, layers: list[MoELayer]) -> None:
    """Raise ModelError if a weight, or a router logit of a trial run, is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
            _reject_infinite(f"weight {name}", parameter)
    seen: dict[str, Tensor] = {}
    handles = [
        layer.gate.register_forward_hook(
            lambda _, __, output, name=layer.name: seen.update(
                {name: output[0] if isinstance(output, tuple) else output}
            )
        )
        for layer in layers
        if layer.gate is not None
    ]
    # Without requests, vLLM's CPU attention returns uninitialised memory; on CUDA it returns zeros.
    handles += [
        module.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        for module in model.modules()
        if isinstance(module, AttentionLayerBase)
    ]
    device = next(model.parameters()).device
    vocabulary = vllm_config.model_config.get_vocab_size()
    ids_T = torch.linspace(0, vocabulary - 1, _TRIAL_TOKENS, device=device).to(torch.int32)
    positions_T = torch.arange(_TRIAL_TOKENS, device=device)
    try:
        with set_forward_context(None, vllm_config, num_tokens=_TRIAL_TOKENS, skip_compiled=True):
            model(input_ids=ids_T, positions=positions_T)
    finally:
        for handle in handles:
            handle.remove()
    for name, logits_TE in seen.items():
        _reject_infinite(f"the router of {name}", logits_TE)


def _reject_infinite(what: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ModelError(
            f"{what} has or gives NaN or infinite values; the checkpoint is damaged or the dtype "
            "too narrow: get it again, or serve it with --dtype float32"
        )
