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


@pytest.mark.parametrize("length", [1, 12, 600])
def test_a_prompt_keeps_the_experts_that_route_keeps(on_gpu: LoadedModel, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    token_1P = torch.randint(2, 8000, (1, length), generator=generator)
    with torch.inference_mode(), route(on_gpu.model, BH) as expected:
        logits = on_gpu.model(token_1P.cuda(), logits_to_keep=1).logits
    # A long prompt is read kernel by kernel first, and by a graph when its length returns.
    for _ in range(3):
        decoded = decode_greedily(on_gpu.model, token_1P.tolist(), BH, max_new_tokens=1)
        assert decoded.token_ids == [[int(logits.argmax())]]
        same = decoded.traces[0].expert_counts == expected.expert_counts
        assert same.float().mean() > 0.999  # sums in another order exchange nearly equal logits


def test_long_prompts_of_similar_lengths_share_a_graph(on_gpu: LoadedModel) -> None:
    prompts = [[token % 8000 for token in range(2, 2 + length)] for length in (601, 640, 610)]
    firsts = []
    for shares in (True, False):
        engine = Engine(on_gpu.model)
        for prompt in prompts:
            engine = engine if shares else Engine(on_gpu.model)
            session = engine.session(engine.bind(on_gpu.model, BH, None), 1, 700, len(prompt))
            session.start([prompt])
            firsts.append(int(session.state.token_B))
        assert list(session._captured) == ([640] if shares else [])
    assert firsts[:3] == firsts[3:]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("length", [12, 600])
def test_a_prefill_makes_no_host_sync(on_gpu: LoadedModel, length: int) -> None:
    engine = engine_of(on_gpu.model)
    session = engine.session(engine.bind(on_gpu.model, BH, None), 2, 700, length)
    prompts = [[7] * length, [9, 8, 7]]
    with torch.inference_mode():
        session.start(prompts)
        token_BP = session.state.token_B.new_zeros(2, length)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            session._read(token_BP, session._length_B)
        finally:
            torch.cuda.set_sync_debug_mode("default")


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
    # Three prompts fill a graph for four.
    prompts = [[5, 900, 77, 12], [3000], [41, 8, 600] * 7]
    together = decode_greedily(on_gpu.model, prompts, BH, max_new_tokens=12)
    for row, prompt in enumerate(prompts):
        alone = decode_greedily(on_gpu.model, [prompt], BH, max_new_tokens=12)
        assert together.token_ids[row] == alone.token_ids[0]
        assert torch.equal(together.traces[row].expert_counts, alone.traces[0].expert_counts)


@pytest.mark.parametrize("batch", [1, 4])
def test_nan_in_one_step_is_noticed(on_gpu: LoadedModel, batch: int) -> None:
    model = copy.deepcopy(on_gpu.model)
    prompts, step, expert = passing_use(model, batch)
    model.model.layers[-1].mlp.experts.down_proj.data[expert] = torch.nan
    assert decode_greedily(model, prompts, TopK(8), max_new_tokens=24).has_nan
    assert not decode_greedily(model, prompts, TopK(8), max_new_tokens=step).has_nan


def passing_use(model: Any, batch: int) -> tuple[list[list[int]], int, int]:
    """Find a prompt, a step and an expert of the last layer that is used there for the first time.

    Later steps don't see the last layer's output, and the last steps don't use the expert.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        prompts = torch.randint(2, 8000, (1, 4), generator=generator).tolist() * batch
        clean = decode_greedily(model, prompts, TopK(8), max_new_tokens=24)
        assert not clean.has_nan
        kept_TK = clean.traces[0].kept_index[:, -1]
        used = [set(row) for row in kept_TK[4:].tolist()]
        before: set[int] = set(kept_TK[:4].flatten().tolist())
        for step, experts in enumerate(used[:16], start=1):
            if passing := experts - before - set().union(*used[18:]):
                return prompts, step, min(passing)
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
    session = engine.session(engine.bind(on_gpu.model, BH, None), 1, 40)

    def write() -> torch.Tensor:
        with torch.inference_mode():
            session.start([[5, 900, 77, 12]])
            return session.run(20).kept_SLBK.clone()

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
