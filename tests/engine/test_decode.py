"""The decode engine: plain generate's tokens, route's counts, and what it leaves to generate."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

from bh_routing.engine.decode import Engine, decode_greedily, engine_of
from bh_routing.engine.generate import generate_greedy, generate_routed
from bh_routing.kernels.decode_layout import UndecodableError
from bh_routing.models import LoadedModel, route
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.random_k import RandomK
from bh_routing.rules.top_k import TopK

PROMPT = "The old man walked down to the river and"
BH = BenjaminiHochberg(alpha=0.5, min_k=2, max_k=10, null="gaussian")


@pytest.mark.parametrize("rule", [TopK(8), TopK(3), BH, RandomK.at_mean(3.5)], ids=str)
def test_tokens_and_experts_are_those_of_generate_under_route(
    demo: LoadedModel, rule: Rule
) -> None:
    with route(demo.model, rule) as expected:
        plain = generate_greedy(demo.model, demo.tokenizer, PROMPT, 8)
    generation, trace, _ = generate_routed(demo.model, demo.tokenizer, PROMPT, 8, rule)
    assert generation.token_ids == plain.token_ids
    assert generation.text == plain.text
    assert torch.equal(trace.expert_counts, expected.expert_counts)
    assert torch.equal(trace.utilization, expected.utilization)
    assert trace.forward_tokens == expected.forward_tokens


def test_the_engine_wrote_it(demo: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    generate_routed(demo.model, demo.tokenizer, PROMPT, 2, TopK(2))
    assert caplog.records == []


def test_an_end_of_text_ends_the_writing(demo: LoadedModel) -> None:
    token_1P = demo.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    free = decode_greedily(demo.model, token_1P, TopK(8), max_new_tokens=8)
    fourth = int(free.token_SB[3, 0])
    ended = decode_greedily(demo.model, token_1P, TopK(8), max_new_tokens=8, end_ids={fourth})
    first = free.token_SB[:, 0].tolist().index(fourth)
    assert ended.token_SB.tolist() == free.token_SB[: first + 1].tolist()
    assert len(ended.trace.forward_tokens) == first + 1


def test_texts_side_by_side_are_written_as_alone(demo: LoadedModel) -> None:
    token_BP = torch.tensor([[5, 900, 77, 12], [3000, 41, 8, 600]])
    together = decode_greedily(demo.model, token_BP, BH, max_new_tokens=6)
    for column, token_P in enumerate(token_BP):
        alone = decode_greedily(demo.model, token_P.unsqueeze(0), BH, max_new_tokens=6)
        assert torch.equal(together.token_SB[:, column], alone.token_SB[:, 0])


def broken(demo: LoadedModel, change: str) -> Any:
    """The demo model, computing something else under the same names."""
    model = copy.deepcopy(demo.model)
    layer: Any = model.model.layers[2]
    if change == "a bias":
        layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(128))
    elif change == "another part":
        layer.mlp.shared_expert = torch.nn.Linear(128, 128)
    else:
        layer.self_attn.scaling = 1.0
    return model


@pytest.mark.parametrize("change", ["a bias", "another part", "another scaling"])
def test_another_layout_is_left_to_generate_with_a_line_in_the_log(
    demo: LoadedModel, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = broken(demo, change)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            generation, trace, _ = generate_routed(model, demo.tokenizer, PROMPT, 3, TopK(4))
    assert len(generation.token_ids) == 3
    assert trace.expert_counts.unique().tolist() == [4]
    assert caplog.text.count("plain generate") == 1
    with pytest.raises(UndecodableError):
        engine_of(model)


def test_settings_that_change_logits_are_left_to_generate(
    demo: LoadedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo.model.generation_config, "repetition_penalty", 1.3)
    generate_routed(demo.model, demo.tokenizer, PROMPT, 2, TopK(2))
    assert "repetition_penalty=1.3" in caplog.text


def test_a_text_longer_than_the_context_is_refused(demo: LoadedModel) -> None:
    engine = Engine(demo.model)
    bound = engine.bind(demo.model, TopK(8), None)
    with pytest.raises(UndecodableError, match="1025 positions is longer than its 1024"):
        engine.session(bound, 1, 1025)
