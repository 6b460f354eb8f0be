"""What a tiny model of one family needs beyond the fields that all families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_LINEAR_THEN_FULL: Final = ("linear_attention", "full_attention")

_IN_GROUPS: Final = {"topk_method": "group_limited_greedy"}

_SPECIAL: Final[Mapping[str, Mapping[str, Any]]] = {
    "bailing_hybrid": {"layer_types": _LINEAR_THEN_FULL},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v4": {
        # The second layer has a router; the first looks experts up by token.
        "mlp_layer_types": ("hash_moe", "moe"),
        "layer_types": ("sliding_attention", "sliding_attention"),
    },
    "deepseek_ocr2": _IN_GROUPS,
    "deepseek_v2": _IN_GROUPS,
    "diffusion_gemma": {"layer_types": ("sliding_attention", "full_attention")},
    "dots3_note": {"layer_types": ("full_attention", "full_attention")},
    "doge": {"is_moe": True},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": (16, 16),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": (1, 1, 2)},
    },
    "flint": {"layer_types": ("sliding_attention", "full_attention")},
    "gemma4": {
        "enable_moe_block": True,
        "layer_types": ("sliding_attention", "full_attention"),
    },
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "mrope_section": (1, 1, 2),
        }
    },
    "glm5_next": {"layer_types": _LINEAR_THEN_FULL, "qk_rope_head_dim": 0, "index_kpool": 4},
    "granitemoehybrid": {"layer_types": _LINEAR_THEN_FULL},
    "jamba": {
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "kimi_linear": {"layer_types": _LINEAR_THEN_FULL},
    "lfm2_moe": {"layer_types": ("conv", "full_attention")},
    # Its sliding layers have twice as many.
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        },
    },
    # A state space, experts, attention, experts.
    "nemotron_h": {"hybrid_override_pattern": "ME*E"},
    "qwen3_5_moe": {"layer_types": _LINEAR_THEN_FULL},
    "qwen3_next": {"layer_types": _LINEAR_THEN_FULL},
    "qwen4_exp": {
        "layer_types": _LINEAR_THEN_FULL,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "unlimited_ocr": _IN_GROUPS,
    "zaya": {"num_experts_per_tok": 1},
}


def special_fields(name: str, top_k: int) -> dict[str, Any]:
    """Return the fields of one family's configuration that no other family shares."""
    fields = dict(_SPECIAL.get(name, {}))
    if name == "dbrx":
        fields["ffn_config"] = {"ffn_hidden_size": 32, "moe_num_experts": 16, "moe_top_k": top_k}
    return fields
