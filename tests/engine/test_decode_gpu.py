"""What only a GPU can show of the decode engine: graphs, kernels, and that nothing waits."""

from __future__ import annotations

import pytest
import torch

from bh_routing.engine.decode import decode_greedily, engine_of
from bh_routing.engine.generate import generate_greedy, generate_routed
from bh_routing.models import LoadedModel, load_model, route
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.random_k import RandomK
from bh_routing.rules.top_k import TopK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
PROMPT = "The old man walked down to the river and"
BH = BenjaminiHochberg(alpha=0.5, min_k=2, max_k=10, null="gaussian")


@pytest.fixture(scope="module")
def on_gpu() -> LoadedModel:
    # float32: in bfloat16 the two largest logits are often equal.
    return load_model("demo", device="cuda", dtype="float32")


@pytest.mark.parametrize("rule", [TopK(8), BH, RandomK.at_mean(3.5)], ids=str)
def test_tokens_and_experts_are_those_of_generate_under_route(
    on_gpu: LoadedModel, rule: Rule, caplog: pytest.LogCaptureFixture
) -> None:
    with route(on_gpu.model, rule) as expected:
        plain = generate_greedy(on_gpu.model, on_gpu.tokenizer, PROMPT, 30)
    generation, trace, _ = generate_routed(on_gpu.model, on_gpu.tokenizer, PROMPT, 30, rule)
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


def test_a_second_text_is_written_as_if_it_were_the_first(on_gpu: LoadedModel) -> None:
    first = generate_routed(on_gpu.model, on_gpu.tokenizer, PROMPT, 20, BH).generation
    generate_routed(on_gpu.model, on_gpu.tokenizer, "Once upon a time there was", 40, BH)
    again = generate_routed(on_gpu.model, on_gpu.tokenizer, PROMPT, 20, BH).generation
    assert again.token_ids == first.token_ids
