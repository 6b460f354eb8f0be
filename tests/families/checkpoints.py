"""Tiny models of every family as checkpoints on disk, with the demo model's tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from bh_routing.demo import demo_folder
from tests.families.zoo import TOP_K, tiny_model

_VOCABULARY: Final = 8_192
_SMALL: Final = {
    "depth": 1,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "encoder_layers": 1,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 32,
    "encoder_ffn_dim": 32,
    "mlp_dim": 32,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 2,
    "head_dim": 16,
    "out_hidden_size": 32,
    "output_dim": 32,
    "deepstack_visual_indexes": [],
}
"""Of the parts that don't read text; a text never reaches them."""


_MARKERS: Final = {"vision_start_token_id": 5, "audio_start_token_id": 6}
"""Published configurations of qwen3_omni_moe hold them; its class has no default for the first."""


def save_tiny(name: str, folder: Path, top_k: int = TOP_K) -> Path:
    """Save the tiny model of a family as a checkpoint that `load_model` reads."""
    model = tiny_model(name, top_k=top_k, vocabulary=_VOCABULARY)
    whole = model if model.can_generate() else _multimodal(model)
    whole.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / file, folder)
    return folder


def _multimodal(text_model: Any) -> Any:
    """Put a model that only reads into the multimodal one that generates."""
    config_class: Any = next(
        whole
        for whole in MODEL_FOR_MULTIMODAL_LM_MAPPING
        if whole.sub_configs.get("text_config") is type(text_model.config)
    )
    parts = {
        field: _shrunk(getattr(config_class(), field).to_dict())
        for field in config_class.sub_configs
        if field != "text_config"
    }
    config = config_class(text_config=text_model.config.to_dict(), **parts, **_MARKERS)
    torch.manual_seed(0)
    whole = AutoModelForMultimodalLM.from_config(config)
    places = [m for m in whole.modules() if isinstance(m, type(text_model))]
    places[0].load_state_dict(text_model.state_dict())
    return whole


def _shrunk(part: Mapping[str, Any]) -> dict[str, Any]:
    """Make a part of a configuration small, and the parts within it."""
    num_layers = part.get("num_hidden_layers")
    small: dict[str, Any] = {}
    for field, value in part.items():
        if isinstance(value, dict):
            small[field] = _shrunk(value)
        elif isinstance(value, list) and len(value) == num_layers:
            small[field] = value[:1]
        else:
            small[field] = _SMALL.get(field, value)
    return small
