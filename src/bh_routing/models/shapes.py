"""Models with a published architecture and random weights, for measuring speed and memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from bh_routing.demo import demo_folder
from bh_routing.models.load import LoadedModel


def make_olmoe_shape(
    device: torch.device, dtype: torch.dtype, *, num_layers: int = 16, seed: int = 0
) -> LoadedModel:
    """Build a model with the shape of allenai/OLMoE-1B-7B-0924, with the demo's tokenizer.

    Args:
        device: device on which the weights are created; bfloat16 takes 14 GB.
        dtype: dtype of the parameters.
        num_layers: number of layers; fewer for a small trial.
        seed: seed of the weights.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    config = OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    earlier = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = OlmoeForCausalLM(config)
    finally:
        torch.set_default_dtype(earlier)
    model.eval().requires_grad_(False)
    model.generation_config.do_sample = False
    return LoadedModel(model, tokenizer)
