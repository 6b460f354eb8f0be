"""The decode engine: plain generate's tokens, route's counts, and what it leaves to generate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from bh_routing.engine.decode import Engine, decode_greedily, engine_of
from bh_routing.engine.generate import generate_batch, generate_greedy, generate_routed
from bh_routing.errors import CalibrationError
from bh_routing.kernels.decode_layout import UndecodableError
from bh_routing.models import LoadedModel, route
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.fixed import RandomK, TopK
from bh_routing.rules.step import ExpertBudget, OpportunisticActivation

PROMPT = "The old man walked down to the river and"
BH = BenjaminiHochberg(alpha=0.5, min_k=2, max_k=10, null="gaussian")


@pytest.mark.parametrize("rule", [TopK(8), TopK(3), BH, RandomK.at_mean(3.5)], ids=str)
def test_tokens_and_experts_are_those_of_generate_under_route(
    demo: LoadedModel, rule: Rule
) -> None:
    with route(demo.model, rule) as expected:
        plain = generate_greedy(demo.model, demo.tokenizer, PROMPT, 8)
    generation, trace = generate_routed(demo.model, demo.tokenizer, PROMPT, 8, rule)
    assert generation.token_ids == plain.token_ids
    assert generation.text == plain.text
    assert torch.equal(trace.expert_counts, expected.expert_counts)
    assert torch.equal(trace.utilization, expected.utilization)
    assert trace.forward_tokens == expected.forward_tokens


def test_the_engine_wrote_it(demo: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    generate_routed(demo.model, demo.tokenizer, PROMPT, 2, TopK(2))
    assert caplog.records == []


def test_an_end_of_text_ends_the_writing(demo: LoadedModel) -> None:
    prompts = [demo.tokenizer(PROMPT)["input_ids"]]
    (free,) = decode_greedily(demo.model, prompts, TopK(8), max_new_tokens=8).token_ids
    ended = decode_greedily(demo.model, prompts, TopK(8), max_new_tokens=8, end_ids={free[3]})
    first = free.index(free[3])
    assert ended.token_ids == [free[: first + 1]]
    assert len(ended.traces[0].forward_tokens) == first + 1


RAGGED = [[5, 900, 77, 12, 33], [3000], [41, 8, 600]]


@pytest.mark.parametrize("rule", [TopK(8), BH], ids=str)
def test_prompts_of_any_length_are_continued_as_alone(demo: LoadedModel, rule: Rule) -> None:
    together = decode_greedily(demo.model, RAGGED, rule, max_new_tokens=6)
    for row, prompt in enumerate(RAGGED):
        alone = decode_greedily(demo.model, [prompt], rule, max_new_tokens=6)
        assert together.token_ids[row] == alone.token_ids[0]
        assert torch.equal(together.traces[row].kept_index, alone.traces[0].kept_index)


def test_a_sequence_that_ends_leaves_the_others_as_they_were(demo: LoadedModel) -> None:
    free = decode_greedily(demo.model, RAGGED, BH, max_new_tokens=8)
    end = free.token_ids[0][2]
    ended = decode_greedily(demo.model, RAGGED, BH, max_new_tokens=8, end_ids={end})
    for tokens, expected, trace in zip(ended.token_ids, free.token_ids, ended.traces, strict=True):
        count = expected.index(end) + 1 if end in expected else 8
        assert tokens == expected[:count]
        assert trace.forward_tokens[1:] == [1] * (count - 1)
    assert len(ended.token_ids[0]) <= 3


def test_a_trace_is_kept_while_the_session_goes_on(demo: LoadedModel) -> None:
    first, *_ = decode_greedily(demo.model, RAGGED[:1], BH, max_new_tokens=3).traces
    before = first.expert_counts
    decode_greedily(demo.model, RAGGED[2:], BH, max_new_tokens=3)
    assert torch.equal(first.expert_counts, before)
    assert torch.equal((first.kept_index >= 0).sum(-1), before)


TEXTS = ["The sea is", PROMPT, "Once"]


@pytest.mark.parametrize("ends", [False, True], ids=["open", "ended"])
@pytest.mark.parametrize(
    "rule", [BH, OpportunisticActivation(3), ExpertBudget(12, refill=12)], ids=str
)
def test_a_batch_is_generated_as_plain_generate_does_under_route(
    demo: LoadedModel, rule: Rule, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(demo.model)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=1)
    if ends:
        free = generate_batch(model, demo.tokenizer, TEXTS, 6, rule)
        model.generation_config.eos_token_id = free[1].generation.token_ids[2]
    ours = generate_batch(model, demo.tokenizer, TEXTS, 6, rule)
    monkeypatch.setattr("bh_routing.engine.generate.decode_greedily", undecodable)
    plain = generate_batch(model, demo.tokenizer, TEXTS, 6, rule)
    for mine, other in zip(ours, plain, strict=True):
        assert mine.generation.token_ids == other.generation.token_ids
        assert torch.equal(mine.expert_counts, other.expert_counts)
        assert mine.trace.forward_tokens == other.trace.forward_tokens
    assert (len(ours[1].generation.token_ids) < 6) == ends


def undecodable(*_: Any, **__: Any) -> None:
    raise UndecodableError("of a test")


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
            generation, trace = generate_routed(model, demo.tokenizer, PROMPT, 3, TopK(4))
    assert len(generation.token_ids) == 3
    assert trace.expert_counts.unique().tolist() == [4]
    assert caplog.text.count("plain generate") == 1
    with pytest.raises(UndecodableError):
        engine_of(model)


class Adapted(nn.Module):
    """A projection with a low-rank addition, as adapters do it: its `weight` is the base's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.full((1, base.in_features), 0.1))
        self.up = nn.Parameter(torch.zeros(base.out_features, 1))
        self.bias = None
        self.out_features = base.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.base(inputs) + inputs @ self.down.T @ self.up.T
        return outputs


def exchange_parameter(model: Any) -> None:
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().flip(0))


def exchange_storage(model: Any) -> None:
    model.model.layers[3].mlp.experts.down_proj.data = torch.zeros(64, 128, 64)


def change_buffer_in_place(model: Any) -> None:
    model.model.rotary_emb.inv_freq.data.mul_(0.5)


def change_attribute(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 10.0


def change_config(model: Any) -> None:
    model.config.clip_qkv = 0.05


def add_adapter(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    generate_routed(model, AutoTokenizer.from_pretrained(model.name_or_path), PROMPT, 2, TopK(8))
    attention.q_proj.up.data.fill_(3.0)


def add_hook(model: Any) -> None:
    model.model.layers[2].register_forward_hook(lambda _, __, output: -output)


CHANGES = [
    exchange_parameter,
    exchange_storage,
    change_buffer_in_place,
    change_attribute,
    change_config,
    add_adapter,
    add_hook,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_writes_what_generate_writes(
    demo: LoadedModel, change: Callable[[Any], None]
) -> None:
    model = copy.deepcopy(demo.model)
    before = generate_routed(model, demo.tokenizer, PROMPT, 8, TopK(8)).generation
    change(model)
    after = generate_routed(model, demo.tokenizer, PROMPT, 8, TopK(8)).generation
    with route(model, TopK(8)):
        plain = generate_greedy(model, demo.tokenizer, PROMPT, 8)
    assert after.token_ids == plain.token_ids
    assert after.token_ids != before.token_ids


def test_a_model_in_another_dtype_is_decoded_in_that_dtype(demo: LoadedModel) -> None:
    model = copy.deepcopy(demo.model)
    first = engine_of(model)
    model.to(torch.bfloat16)
    generation, _ = generate_routed(model, demo.tokenizer, PROMPT, 8, TopK(8))
    with route(model, TopK(8)):
        plain = generate_greedy(model, demo.tokenizer, PROMPT, 8)
    assert generation.token_ids == plain.token_ids
    assert engine_of(model) is not first


def test_dropout_is_left_to_generate(demo: LoadedModel) -> None:
    model = copy.deepcopy(demo.model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    engine_of(model)
    model.train()
    with pytest.raises(UndecodableError):
        engine_of(model)


def test_a_model_that_was_put_right_is_decoded_again(demo: LoadedModel) -> None:
    model = broken(demo, "a bias")
    with pytest.raises(UndecodableError):
        engine_of(model)
    model.model.layers[2].self_attn.q_proj.bias = None
    assert engine_of(model) is engine_of(model)


def test_an_unchanged_model_keeps_its_engine(demo: LoadedModel) -> None:
    engine = engine_of(demo.model)
    generate_routed(demo.model, demo.tokenizer, PROMPT, 2, TopK(8))
    generate_greedy(demo.model, demo.tokenizer, PROMPT, 2)
    demo.model(torch.tensor([[5, 900]]), output_hidden_states=True, output_router_logits=True)
    assert engine_of(demo.model) is engine


def test_a_calibration_of_weights_that_changed_in_place_is_rejected(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    model = copy.deepcopy(demo.model)
    rule = BenjaminiHochberg(alpha=0.5, max_k=8)
    generate_routed(model, demo.tokenizer, PROMPT, 2, rule, demo_calibration)
    model.model.layers[0].mlp.gate.weight.data.mul_(2)
    with pytest.raises(CalibrationError, match="model"):
        generate_routed(model, demo.tokenizer, PROMPT, 2, rule, demo_calibration)


def test_a_text_longer_than_the_context_is_refused(demo: LoadedModel) -> None:
    engine = Engine(demo.model)
    bound = engine.bind(demo.model, TopK(8), None)
    with pytest.raises(UndecodableError, match="1025 positions is longer than its 1024"):
        engine.session(bound, 1, 1025)


def test_a_text_may_fill_the_context(demo: LoadedModel) -> None:
    prompt = [number % 8000 + 2 for number in range(1023)]
    decoded = decode_greedily(demo.model, [prompt], TopK(1), max_new_tokens=2)
    assert len(decoded.token_ids[0]) == 2
    assert decoded.traces[0].forward_tokens == [1023, 1]
    with pytest.raises(UndecodableError):
        decode_greedily(demo.model, [prompt], TopK(1), max_new_tokens=3)
