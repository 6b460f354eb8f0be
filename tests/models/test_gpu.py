"""What only a GPU can show: bfloat16 routing there, and selectors that never wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.generate import generate_greedy
from bh_routing.engine.texts import packaged_documents
from bh_routing.models import LoadedModel, load_model, route
from bh_routing.models.routing import bind_rule
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.fixed import TopK
from bh_routing.rules.plan import Candidates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.fixture(scope="module")
def on_gpu() -> LoadedModel:
    return load_model("demo", device="cuda")


@pytest.fixture(scope="module")
def calibration(on_gpu: LoadedModel) -> Calibration:
    texts = [document.text for document in packaged_documents("calibration")]
    return calibrate(on_gpu.model, on_gpu.tokenizer, texts)


@contextmanager
def refuse_syncs() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_keeping_everything_is_bit_identical_in_bfloat16(on_gpu: LoadedModel) -> None:
    inputs = on_gpu.tokenizer("The old man walked down", return_tensors="pt").to("cuda")
    with torch.inference_mode():
        plain = on_gpu.model(**inputs).logits
        with route(on_gpu.model, TopK(k=8)):
            routed = on_gpu.model(**inputs).logits
        after = on_gpu.model(**inputs).logits
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain, routed)
    assert torch.equal(plain, after)


def test_generation_under_bh_counts_every_token(
    on_gpu: LoadedModel, calibration: Calibration
) -> None:
    with route(on_gpu.model, BenjaminiHochberg(alpha=0.05), calibration) as trace:
        generation = generate_greedy(on_gpu.model, on_gpu.tokenizer, "The old man", 20)
    tokens = generation.num_input_tokens + len(generation.token_ids) - 1
    assert trace.expert_counts.shape == (tokens, 6)
    assert 1 <= trace.expert_counts.min() < trace.expert_counts.max() <= 8


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_selecting_makes_no_host_sync(on_gpu: LoadedModel, calibration: Calibration) -> None:
    logits = torch.randn(512, 64, device="cuda")
    weights, index = logits.softmax(-1).topk(8, dim=-1)
    for rule in (TopK(k=4), BenjaminiHochberg(alpha=0.05)):
        select = bind_rule(on_gpu.model, rule, calibration).selectors[0]
        with refuse_syncs():
            select(Candidates(logits, index, weights))
