"""What only a GPU can show of the decode engine: graphs, kernels, and that nothing waits."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

from bh_routing.engine.decode import Engine, decode_greedily, engine_of
from bh_routing.engine.generate import generate_greedy, generate_routed
from bh_routing.kernels.router import fused_router
from bh_routing.models import LoadedModel, load_model, route
from bh_routing.models.routing import bind_rule, install
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.fixed import TopK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
PROMPT = "The old man walked down to the river and"
STOREY = BenjaminiHochberg(alpha=0.5, max_k=8, null="gaussian", procedure="storey")
BH = BenjaminiHochberg(alpha=0.5, min_k=2, max_k=10, null="gaussian")


@pytest.fixture(scope="module")
def on_gpu() -> LoadedModel:
    # float32: in bfloat16 the two largest logits are often equal.
    return load_model("demo", device="cuda", dtype="float32")


@pytest.mark.parametrize("rule", [TopK(8), BH, STOREY], ids=str)
def test_tokens_and_experts_are_those_of_generate_under_route(
    on_gpu: LoadedModel, rule: Rule, caplog: pytest.LogCaptureFixture
) -> None:
    with route(on_gpu.model, rule) as expected:
        plain = generate_greedy(on_gpu.model, on_gpu.tokenizer, PROMPT, 30)
    generation, trace = generate_routed(on_gpu.model, on_gpu.tokenizer, PROMPT, 30, rule)
    assert caplog.records == []
    assert generation.token_ids == plain.token_ids
    assert torch.equal(trace.expert_counts, expected.expert_counts)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_steps_make_no_host_sync(on_gpu: LoadedModel, batch: int) -> None:
    engine = engine_of(on_gpu.model)
    session = engine.session(engine.bind(on_gpu.model, BH, None), batch, 100)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            session.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_texts_side_by_side_are_written_as_alone(on_gpu: LoadedModel) -> None:
    token_BP = torch.tensor([[5, 900, 77, 12], [3000, 41, 8, 600]], device="cuda")
    together = decode_greedily(on_gpu.model, token_BP, BH, max_new_tokens=12)
    for column, token_P in enumerate(token_BP):
        alone = decode_greedily(on_gpu.model, token_P.unsqueeze(0), BH, max_new_tokens=12)
        assert torch.equal(together.token_SB[:, column], alone.token_SB[:, 0])


@pytest.mark.parametrize("batch", [1, 4])
def test_nan_in_one_step_is_noticed(on_gpu: LoadedModel, batch: int) -> None:
    model = copy.deepcopy(on_gpu.model)
    token_BP, step, expert = passing_use(model, batch)
    model.model.layers[-1].mlp.experts.down_proj.data[expert] = torch.nan
    assert decode_greedily(model, token_BP, TopK(8), max_new_tokens=24).has_nan
    assert not decode_greedily(model, token_BP, TopK(8), max_new_tokens=step).has_nan


def passing_use(model: Any, batch: int) -> tuple[torch.Tensor, int, int]:
    """Find a prompt, a step and an expert of the last layer that is used there for the first time.

    Later steps don't see the last layer's output, and the last steps don't use the expert.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        token_BP = torch.randint(2, 8000, (1, 4), generator=generator).repeat(batch, 1).cuda()
        clean = decode_greedily(model, token_BP, TopK(8), max_new_tokens=24)
        assert not clean.has_nan
        kept_TK = clean.trace.kept_index[:, -1]
        # The prompt's positions come first, then one row per step and sequence.
        used = [set(row) for row in kept_TK[4 * batch :: batch].tolist()]
        before: set[int] = set(kept_TK[:4].flatten().tolist())
        for step, experts in enumerate(used[:16], start=1):
            if passing := experts - before - set().union(*used[18:]):
                return token_BP, step, min(passing)
            before |= experts
    raise AssertionError("no expert is used in passing")


def test_a_changed_model_writes_what_generate_writes(on_gpu: LoadedModel) -> None:
    model = copy.deepcopy(on_gpu.model)
    before = generate_routed(model, on_gpu.tokenizer, PROMPT, 12, TopK(8)).generation
    model.model.layers[3].mlp.experts.down_proj.data = torch.zeros(64, 128, 64, device="cuda")
    after = generate_routed(model, on_gpu.tokenizer, PROMPT, 12, TopK(8)).generation
    with route(model, TopK(8)):
        plain = generate_greedy(model, on_gpu.tokenizer, PROMPT, 12)
    assert after.token_ids == plain.token_ids != before.token_ids


def test_a_second_text_is_written_as_if_it_were_the_first(on_gpu: LoadedModel) -> None:
    first = generate_routed(on_gpu.model, on_gpu.tokenizer, PROMPT, 20, BH).generation
    generate_routed(on_gpu.model, on_gpu.tokenizer, "Once upon a time there was", 40, BH)
    again = generate_routed(on_gpu.model, on_gpu.tokenizer, PROMPT, 20, BH).generation
    assert again.token_ids == first.token_ids


def test_a_graph_goes_on_using_memory_that_stays_its_own(on_gpu: LoadedModel) -> None:
    engine = Engine(on_gpu.model)
    token_BP = torch.tensor([[5, 900, 77, 12]], device="cuda")
    session = engine.session(engine.bind(on_gpu.model, BH, None), 1, 40)
    with torch.inference_mode():
        cache = on_gpu.model(token_BP, use_cache=True).past_key_values

    def write() -> torch.Tensor:
        with torch.inference_mode():
            position = session.start(cache, token_BP[:, -1])
            return session.run(position, 20, ()).kept_SLBK.clone()

    expected = write()
    # What the session's making let go of is taken by others, and holds what they write.
    gc.collect()
    others = [torch.full((size,), -1e9, device="cuda") for size in (1, 16, 64, 512, 4096) * 200]
    assert torch.equal(write(), expected)
    assert len(others) == 1000


@pytest.mark.parametrize("rule", [TopK(6), BH], ids=str)
def test_scoring_keeps_the_same_experts_with_kernels_and_without(
    on_gpu: LoadedModel, rule: Rule
) -> None:
    token_BP = torch.arange(5, 405, device="cuda").view(2, 200)
    kept = []
    for fuse in (fused_router, None):
        bound = bind_rule(on_gpu.model, rule, fuse=fuse)
        with torch.inference_mode(), install(on_gpu.model, bound) as trace:
            on_gpu.model(token_BP, use_cache=False)
        kept.append(trace.kept_index)
    assert all(bind_rule(on_gpu.model, rule, fuse=fused_router).deciders)
    assert torch.equal(*kept)
