"""A tiny random model of every mixture-of-experts family that the installed transformers has."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import nn

from tests.families.special import special_fields

NUM_EXPERTS: Final = 16
TOP_K: Final = 4
VOCABULARY: Final = 96
_LAYERS: Final = 2
_SEED: Final = 0
_ROUTER_STD: Final = 0.35

_SMALL: Final[dict[str, Any]] = {
    "hidden_size": 32,
    "d_model": 32,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 32,
    "ffn_hidden_size": 32,
    "expert_ffn_hidden_size": 16,
    "moe_intermediate_size": 16,
    "moe_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "share_expert_dim": 16,
    "router_hidden_size": 16,
    "num_hidden_layers": _LAYERS,
    "num_layers": _LAYERS,
    "n_layers": _LAYERS,
    "mlp_layer_types": ("sparse",) * _LAYERS,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "mlp_only_layers": (),
    "max_position_embeddings": 128,
    "max_seq_len": 128,
    "sliding_window": 64,
    "sliding_window_size": 64,
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 4,
    "head_dim": 8,
    "global_head_dim": 8,
    "kv_channels": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "rel_extent": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "zero_expert_num": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    # Half of the groups are left out, so that no more than 8 experts can be reached.
    "n_group": 4,
    "topk_group": 2,
    # Wider than the default, so that a dropped expert is seen in the logits.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Wherever a configuration has a field of this name, a tiny model sets it to this."""

_TOP_K_FIELDS: Final = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "top_k_experts",
)

_HEADS: Final = ("ForCausalLM", "TextModel", "ForTokenClassification")
"""Which class of a family is built: the first kind that there is."""


def family_names() -> tuple[str, ...]:
    """Names of all families with experts whose model reads text from left to right."""
    return tuple(name for name, model_class in _model_classes().items() if model_class)


def left_out() -> tuple[str, ...]:
    """Names of the families with experts that have no such model."""
    return tuple(name for name, model_class in _model_classes().items() if not model_class)


def tiny_model(
    name: str,
    dtype: torch.dtype = torch.float32,
    top_k: int = TOP_K,
    fields: Mapping[str, Any] | None = None,
    vocabulary: int = VOCABULARY,
) -> Any:
    """Build a random model of one family, the same on every call, in evaluation mode.

    Args:
        name: one of `family_names`.
        dtype: of the parameters that the family doesn't keep in float32.
        top_k: experts a token, as the family's own configuration says it.
        fields: other values of the configuration, where it has such fields.
        vocabulary: tokens that it knows.
    """
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    model_class: Any = getattr(module, _model_classes()[name])
    sizes = dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), vocabulary)
    config = _tiny_config(
        model_class.config_class, top_k, special_fields(name, top_k), {**sizes, **(fields or {})}
    )
    torch.manual_seed(_SEED)
    model = model_class(config)
    _decide(model, top_k)
    _cast(model, dtype)
    return model.eval().requires_grad_(False)


@cache
def _model_classes() -> Mapping[str, str]:
    """Folder of every family with experts -> the name of the class to build, "" if none fits.

    The source is read, not imported: finding the families must not take seconds.
    """
    found = {}
    for path in sorted(Path(transformers.__path__[0], "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if re.search(r"self\.(experts|num_experts) = ", source):
            classes = re.findall(r"^class (\w+)\(", source, re.MULTILINE)
            fitting = [name for ending in _HEADS for name in classes if name.endswith(ending)]
            found[path.parent.name] = next(iter(fitting), "")
    return found


def _tiny_config(
    config_class: Any, top_k: int, special: Mapping[str, Any], fields: Mapping[str, Any]
) -> Any:
    known = {*config_class().to_dict(), *config_class.attribute_map}
    small = {**_SMALL, **dict.fromkeys(_TOP_K_FIELDS, top_k), **fields}
    values = {field: value for field, value in small.items() if field in known}
    return config_class(**{field: _as_list(v) for field, v in {**values, **special}.items()})


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@torch.no_grad()
def _decide(model: nn.Module, top_k: int) -> None:
    """Spread the router's scores, as training does; a random router scores all experts alike."""
    for block in model.modules():
        if isinstance(getattr(block, "experts", None), nn.Module) or hasattr(block, "router_gate"):
            for name, tensor in block.state_dict().items():
                if "experts" in name:
                    continue
                if not tensor.is_floating_point():
                    # A table of experts for each token, all zeros until a checkpoint fills it.
                    tensor.copy_(torch.rand(len(tensor), NUM_EXPERTS).argsort()[:, :top_k])
                    continue
                if tensor.ndim == 2 and {"gate", "router", "router_gate"} & set(name.split(".")):
                    nn.init.normal_(tensor, std=_ROUTER_STD)
                elif tensor.numel() == NUM_EXPERTS:
                    # A bias or scale of each expert: with the neutral one it would go untested.
                    tensor.add_(0.1 * torch.randn(tensor.shape))


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Cast what `from_pretrained` casts: some families keep a few tensors in float32."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in name for part in kept):
            tensor.data = tensor.data.to(dtype)
