"""A fingerprint covers all that a model's results depend on, and nothing else."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bh_routing.models.load import LoadedModel
from bh_routing.models.routers import model_fingerprint, model_settings, tokenizer_fingerprint
from bh_routing.results.files import render_json


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_experts_per_tok", 4),
        ("norm_topk_prob", True),
        ("rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        ("rms_norm_eps", 1e-3),
        ("clip_qkv", 1.0),
    ],
)
def test_equal_weights_under_another_setting_are_another_model(
    demo: LoadedModel, name: str, value: Any
) -> None:
    other = copy.deepcopy(demo.model)
    assert model_fingerprint(other) == model_fingerprint(demo.model)
    setattr(other.config, name, value)
    assert model_fingerprint(other) != model_fingerprint(demo.model)
    assert model_settings(other)["config"][name] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformers_version", "4.0.0"),
        ("architectures", ["Other", "OlmoeForCausalLM"]),
        ("_name_or_path", "/elsewhere"),
        ("use_cache", False),
        ("output_router_logits", True),
    ],
)
def test_where_a_model_came_from_and_what_else_it_returns_is_no_part_of_it(
    demo: LoadedModel, name: str, value: Any
) -> None:
    other = copy.deepcopy(demo.model)
    setattr(other.config, name, value)
    assert model_fingerprint(other) == model_fingerprint(demo.model)


def test_a_correction_bias_is_part_of_a_model_though_it_is_a_buffer() -> None:
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=0, num_attention_heads=4, num_key_value_heads=4,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    bias = model.model.layers[0].mlp.gate.e_score_correction_bias
    before = model_fingerprint(model)
    with torch.no_grad():
        bias[3] += 0.5
    assert "e_score_correction_bias" not in dict(model.named_parameters())
    assert model_fingerprint(model) != before


def test_a_buffer_that_follows_from_the_configuration_is_no_part_of_it(demo: LoadedModel) -> None:
    other = copy.deepcopy(demo.model)
    unsaved = set(dict(other.named_buffers())) - set(other.state_dict())
    assert unsaved  # rotary frequencies, which some rules of scaling change as they go
    for name in unsaved:
        other.get_buffer(name).mul_(2)
    assert model_fingerprint(other) == model_fingerprint(demo.model)


def test_settings_of_generation_are_known_and_leave_the_model_itself_alone(
    demo: LoadedModel,
) -> None:
    other = copy.deepcopy(demo.model)
    other.generation_config.repetition_penalty = 1.3
    assert model_fingerprint(other) == model_fingerprint(demo.model)
    changed = model_settings(other)["generation_config"]
    assert changed == model_settings(demo.model)["generation_config"] | {"repetition_penalty": 1.3}


def test_a_tokenizers_fingerprint_is_that_of_what_it_does(demo: LoadedModel) -> None:
    before = tokenizer_fingerprint(demo.tokenizer)
    other = copy.deepcopy(demo.tokenizer)
    other(["a", "b c"], padding=True, truncation=True, max_length=8)
    assert tokenizer_fingerprint(other) == before
    other.add_special_tokens({"bos_token": "<s>"})
    assert tokenizer_fingerprint(other) != before


@pytest.mark.parametrize(
    "value",
    [math.inf, [0.0, math.inf], {"nested": (math.nan, -math.inf)}, {n: n for n in range(12)}],
)
def test_settings_survive_strict_json_as_they_are(demo: LoadedModel, value: Any) -> None:
    model = copy.deepcopy(demo.model)
    model.config.time_step_limit = value
    settings = model_settings(model)
    assert json.loads(render_json(settings)) == settings
