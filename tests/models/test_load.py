"""Loading refuses what it can't load, in one sentence, and reads nothing that could run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from bh_routing.demo import demo_folder
from bh_routing.errors import InputError, ModelError
from bh_routing.models import LoadedModel, describe_model, load_model, route
from bh_routing.rules.fixed import TopK


def test_the_demo_and_its_folder_are_the_same_model(demo: LoadedModel) -> None:
    same = load_model(str(demo_folder()), device="cpu")
    assert describe_model(same.model) == describe_model(demo.model)
    facts = describe_model(demo.model)
    assert (facts.num_layers, facts.num_experts, facts.model_top_k) == (6, 64, 8)
    assert facts.dtype == "float32"


def test_bfloat16_is_loaded_when_asked_for() -> None:
    model, _ = load_model("demo", device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16


def test_a_hub_id_without_a_network_fails_fast_and_names_the_way_out() -> None:
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"can't be reached.*model=.demo"):
        load_model("allenai/OLMoE-1B-7B-0924", device="cpu")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("name", "match"),
    [("./nowhere", "doesn't exist"), ("a/b/c", "doesn't exist"), ("", "empty")],
)
def test_a_missing_folder_is_named(name: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        load_model(name, device="cpu")


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(str(tmp_path), device="cpu")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    for file in demo_folder().iterdir():
        if file.suffix in {".json", ".safetensors"}:
            (tmp_path / file.name).write_bytes(file.read_bytes()[: 2**20])
    with pytest.raises(ModelError, match="can't be loaded"):
        load_model(str(tmp_path), device="cpu")


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_folder()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="llama"):
        load_model(str(tmp_path), device="cpu")


def test_the_text_part_of_a_multimodal_model_is_routed(tmp_path: Path) -> None:
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 8,
            "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
            "out_hidden_size": 32, "deepstack_visual_indexes": [],
        },
    )  # fmt: skip
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_folder()).save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), device="cpu")
    inputs = tokenizer("The old man walked", return_tensors="pt")
    with route(model, TopK(1)) as trace, torch.inference_mode():
        model(**inputs)
    assert trace.expert_counts.shape == (inputs["input_ids"].shape[1], 2)
    assert trace.expert_counts.unique().tolist() == [1]


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    model, tokenizer = load_model("demo", device="cpu")
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(5)])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="8197"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("options", "match"),
    [({"device": "tpu"}, "tpu"), ({"device": "cpu", "dtype": "int8"}, "int8")],
)
def test_wrong_options_are_named(options: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_model("demo", **options)  # type: ignore[arg-type]
