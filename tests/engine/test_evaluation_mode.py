"""Whoever hands over a training model gets the numbers of evaluation, and the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.generate import generate_greedy, generate_routed
from bh_routing.engine.proposals import capture_proposals
from bh_routing.engine.score import score
from bh_routing.engine.windows import TokenizedDocument
from bh_routing.errors import ModelError
from bh_routing.models import LoadedModel, load_model, route
from bh_routing.rules.fixed import TopK

TEXTS = ["The old man walked down to the river and sat there for a long time. " * 8]


@pytest.fixture(scope="module")
def dropping() -> LoadedModel:
    loaded = load_model("demo", device="cpu")
    for layer in loaded.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return loaded


@pytest.fixture(autouse=True)
def is_training(dropping: LoadedModel) -> Iterator[None]:
    """One module stays in evaluation mode, to be found so afterwards."""
    dropping.model.train()
    dropping.model.model.norm.eval()
    before = [module.training for module in dropping.model.modules()]
    yield
    assert [module.training for module in dropping.model.modules()] == before


def in_both_modes(
    demo: LoadedModel, dropping: LoadedModel, call: Callable[[Any, Any], Any]
) -> tuple[Any, Any]:
    return call(*demo), call(*dropping)


@pytest.mark.parametrize("null", ["background", "needed_by_loss"])
def test_calibration_is_without_dropout(
    demo: LoadedModel, dropping: LoadedModel, null: str
) -> None:
    expected, found = in_both_modes(
        demo, dropping, lambda model, tokenizer: calibrate(model, tokenizer, TEXTS, nulls=(null,))
    )
    assert found.fingerprint == expected.fingerprint


def test_scores_are_without_dropout(demo: LoadedModel, dropping: LoadedModel) -> None:
    ids = demo.tokenizer(TEXTS[0])["input_ids"]
    documents = [TokenizedDocument(key="d:0", name="a", cluster="a", domain="", ids=ids)]
    expected, found = in_both_modes(
        demo,
        dropping,
        lambda model, tokenizer: list(
            score(model, tokenizer, documents, {"top_k_4": TopK(4)}, window=64, stride=64)
        ),
    )
    assert found == expected


def test_proposals_are_without_dropout(demo: LoadedModel, dropping: LoadedModel) -> None:
    ids = demo.tokenizer(TEXTS[0])["input_ids"]
    documents = [TokenizedDocument(key="d:0", name="a", cluster="a", domain="", ids=ids)]
    expected, found = in_both_modes(
        demo,
        dropping,
        lambda model, tokenizer: capture_proposals(
            model, tokenizer, documents, window=64, num_candidates=8
        ),
    )
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(ours.router_logits_TE, theirs.router_logits_TE)


def test_generation_is_without_dropout(demo: LoadedModel, dropping: LoadedModel) -> None:
    expected, found = in_both_modes(
        demo,
        dropping,
        lambda model, tokenizer: generate_routed(model, tokenizer, "The old man", 8, TopK(4)),
    )
    assert found.generation.token_ids == expected.generation.token_ids
    expected, found = in_both_modes(
        demo, dropping, lambda model, tokenizer: generate_greedy(model, tokenizer, "The old man", 8)
    )
    assert found.token_ids == expected.token_ids


def test_calibration_leaves_the_models_gradients_alone(dropping: LoadedModel) -> None:
    dropping.model.requires_grad_(True)
    try:
        calibrate(
            dropping.model, dropping.tokenizer, TEXTS, nulls=("needed_by_loss",), max_tokens=40
        )
        assert all(parameter.grad is None for parameter in dropping.model.parameters())
    finally:
        dropping.model.requires_grad_(False)


def test_calibration_inside_route_is_rejected(dropping: LoadedModel) -> None:
    with route(dropping.model, TopK(2)), pytest.raises(ModelError, match="already inside route"):
        calibrate(dropping.model, dropping.tokenizer, TEXTS)
