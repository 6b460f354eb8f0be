"""Greedy generation by either path: a checkpoint's settings are obeyed, NaN is noticed."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from bh_routing.engine.decode import decode_greedily
from bh_routing.engine.generate import generate_greedy, generate_routed
from bh_routing.models import LoadedModel
from bh_routing.rules.fixed import TopK

PROMPT = "The old man walked down to the"
SETTINGS: list[dict[str, Any]] = [
    {"stop_strings": ["very"]},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 3.0},
    {"watermarking_config": {"bias": 5.0, "greenlist_ratio": 0.25}},
    {"max_time": 1e-9},
    {"repetition_penalty": 1.3},
    {"suppress_tokens": [13, 292]},
    {"bad_words_ids": [[13]]},
    {"sequence_bias": [[[13], -50.0]]},
    {"min_new_tokens": 5},
    {"forced_eos_token_id": 9},
    {"exponential_decay_length_penalty": (2, 3.0)},
    {"prompt_lookup_num_tokens": 3},
]
HARMLESS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
    {"num_beams": 3},
    {"max_length": 4096},
    {"return_dict_in_generate": True},
    {"return_dict_in_generate": True, "output_scores": True},
    {"eos_token_id": [13, 292]},
    {"eos_token_id": None},
    {"cache_implementation": "static"},
]


def with_settings(demo: LoadedModel, settings: dict[str, Any]) -> Any:
    model = copy.copy(demo.model)  # weights are shared
    model.generation_config = GenerationConfig(**{"eos_token_id": 0, "pad_token_id": 1} | settings)
    return model


def plainly(model: Any, demo: LoadedModel) -> list[int]:
    inputs = demo.tokenizer(PROMPT, return_tensors="pt")
    config = copy.deepcopy(model.generation_config)
    config.update(return_dict_in_generate=False, do_sample=False, num_beams=1, max_length=None)
    output = model.generate(**inputs, generation_config=config, max_new_tokens=12,
                            tokenizer=demo.tokenizer)  # fmt: skip
    ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_that_change_a_text_are_obeyed_and_named_in_the_log(
    demo: LoadedModel, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = with_settings(demo, settings)
    generation, trace = generate_routed(model, demo.tokenizer, PROMPT, 12, TopK(8))
    assert generation.token_ids == plainly(model, demo)
    assert "its generation settings ask for" in caplog.text
    assert trace.expert_counts.unique().tolist() == [8]


@pytest.mark.parametrize("settings", HARMLESS, ids=str)
def test_settings_that_change_nothing_are_left_to_the_engine(
    demo: LoadedModel, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = with_settings(demo, settings)
    generation, _ = generate_routed(model, demo.tokenizer, PROMPT, 12, TopK(8))
    assert generation.token_ids == plainly(model, demo)
    assert "plain generate" not in caplog.text


def test_a_checkpoint_that_asks_for_a_dict_is_written_by_plain_generate_too(
    demo: LoadedModel,
) -> None:
    model = with_settings(demo, {"repetition_penalty": 1.1, "return_dict_in_generate": True})
    generation, _ = generate_routed(model, demo.tokenizer, PROMPT, 12, TopK(8))
    assert generation.token_ids == plainly(model, demo)


def lone_expert(demo: LoadedModel, step: int) -> Any:
    """An expert of the last layer that one step alone keeps; step 0 is the prompt's last token."""
    prompt = demo.tokenizer(PROMPT)["input_ids"]
    (trace,) = decode_greedily(demo.model, [prompt], TopK(8), max_new_tokens=10).traces
    kept_SK = trace.kept_index[len(prompt) - 1 :, -1]
    uses = Counter(kept_SK.flatten().tolist())
    return next(expert for expert in kept_SK[step].tolist() if uses[expert] == 1)


@pytest.mark.parametrize("settings", [{}, {"remove_invalid_values": True}], ids=["engine", "plain"])
@pytest.mark.parametrize("step", [0, 4, 6])
def test_nan_in_one_step_is_noticed(demo: LoadedModel, step: int, settings: dict[str, Any]) -> None:
    expert = lone_expert(demo, step)
    model = copy.deepcopy(demo.model)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=1, **settings)
    assert not generate_routed(model, demo.tokenizer, PROMPT, 10, TopK(8)).generation.has_nan
    model.model.layers[-1].mlp.experts.down_proj.data[expert] = torch.nan
    assert generate_routed(model, demo.tokenizer, PROMPT, 10, TopK(8)).generation.has_nan


def test_a_logit_that_overflows_is_noticed(demo: LoadedModel) -> None:
    model = copy.deepcopy(demo.model)
    generation = generate_greedy(model, demo.tokenizer, PROMPT, 3)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight.data[generation.token_ids[2]].mul_(1e38)
    assert generate_greedy(model, demo.tokenizer, PROMPT, 3).has_nan
    assert generate_routed(model, demo.tokenizer, PROMPT, 3, TopK(8)).generation.has_nan


def test_nan_after_the_end_of_the_text_does_not_count(demo: LoadedModel) -> None:
    prompts = [demo.tokenizer(PROMPT)["input_ids"]]
    (clean,) = decode_greedily(demo.model, prompts, TopK(8), max_new_tokens=8).token_ids
    model = copy.deepcopy(demo.model)
    model.model.layers[-1].mlp.experts.down_proj.data[lone_expert(demo, 6)] = torch.nan
    third = clean[2]
    assert third not in clean[:2]
    ended = decode_greedily(model, prompts, TopK(8), max_new_tokens=8, end_ids={third})
    assert not ended.has_nan
    assert decode_greedily(model, prompts, TopK(8), max_new_tokens=8).has_nan
