"""Sparse experts inside a model on a GPU: graphs, compilation, and no waiting."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OlmoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from bh_routing.kernels.experts import MOST_FEW_TOKENS, NAME, sparse_experts_forward
from bh_routing.models import LoadedModel, route
from bh_routing.rules.fixed import TopK

pytestmark = pytest.mark.gpu

TOKENS = [1, MOST_FEW_TOKENS + 1, 300]


@pytest.fixture(scope="module")
def on_gpu(demo: LoadedModel) -> LoadedModel:
    model = copy.deepcopy(demo.model).to("cuda", torch.bfloat16)
    ALL_EXPERTS_FUNCTIONS.register(NAME, sparse_experts_forward)
    model.set_experts_implementation("eager")
    return LoadedModel(model, demo.tokenizer)


@pytest.fixture
def experts(on_gpu: LoadedModel) -> Any:
    return on_gpu.model.model.layers[2].mlp.experts


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_routing(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(tokens, 128, device="cuda", generator=generator)
    scores = torch.rand(tokens, 64, device="cuda", generator=generator)
    weights, index = scores.topk(8, dim=-1)
    is_dropped = torch.rand(tokens, 8, device="cuda", generator=generator) < 0.5
    index = torch.where(is_dropped, index[:, :1], index)
    return hidden.bfloat16(), index, weights.masked_fill(is_dropped, 0.0).bfloat16()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("tokens", TOKENS)
def test_mixing_makes_no_host_sync(experts: Any, tokens: int) -> None:
    routing = make_routing(tokens)
    sparse_experts_forward(experts, *routing)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_experts_forward(experts, *routing)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_graph_mixes_new_routings_as_a_launch_does(experts: Any, tokens: int) -> None:
    inputs = make_routing(tokens)
    sparse_experts_forward(experts, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = sparse_experts_forward(experts, *inputs)
    for seed in (1, 2, 3):
        fresh = make_routing(tokens, seed)
        for held, new in zip(inputs, fresh, strict=True):
            held.copy_(new)
        graph.replay()
        assert torch.equal(mixed, sparse_experts_forward(experts, *fresh))


@pytest.mark.parametrize("tokens", TOKENS)
def test_many_runs_in_a_row_give_the_same_bits(experts: Any, tokens: int) -> None:
    routing = make_routing(tokens)
    first = sparse_experts_forward(experts, *routing)
    # Back to back, so that a kernel that starts before its inputs are written would show.
    again = [sparse_experts_forward(experts, *make_routing(tokens, seed % 2)) for seed in range(50)]
    assert all(torch.equal(first, mixed) for mixed in again[::2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("tokens", TOKENS)
def test_compilation_takes_them_whole(experts: Any, tokens: int) -> None:
    routing = make_routing(tokens)
    compiled = torch.compile(sparse_experts_forward, fullgraph=True)
    torch.testing.assert_close(
        compiled(experts, *routing), sparse_experts_forward(experts, *routing)
    )


@pytest.mark.parametrize("tokens", [1, 8, 10, 100, 512, 1000])
def test_experts_of_olmoe_1b_7b_mix_what_grouped_mm_mixes(tokens: int) -> None:
    config = OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64)
    with torch.device("cuda"):
        experts = OlmoeExperts(config).to(torch.bfloat16)
    for parameter in experts.parameters():
        parameter.normal_(std=0.05)
    _, index, weights = make_routing(tokens)  # as many pairs an expert as each tile is for
    hidden = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    grouped: Any = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    expected = grouped(experts, hidden, index, weights).float()
    mixed = sparse_experts_forward(experts, hidden, index, weights).float()
    assert (mixed - expected).norm() < 1e-2 * expected.norm()


def test_a_model_says_with_them_what_it_says_without(on_gpu: LoadedModel) -> None:
    # float32: the rounding of bfloat16 changes which experts later layers choose.
    model = copy.deepcopy(on_gpu.model).float()
    inputs = on_gpu.tokenizer("The old man walked down to the river", return_tensors="pt")
    logits = {}
    for name in ("eager", NAME):
        model.set_experts_implementation(name)
        with route(model, TopK(4)):
            logits[name] = model(**inputs.to("cuda")).logits
    torch.testing.assert_close(logits[NAME], logits["eager"], rtol=1e-3, atol=1e-3)
