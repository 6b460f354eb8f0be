"""Rules that decide tokens together know their sequences. Axes: B batch, S positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.decode import decode_greedily
from bh_routing.engine.proposals import capture_proposals, mean_experts
from bh_routing.engine.score import score
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, tokenize_documents
from bh_routing.models import find_routers, route
from bh_routing.models.load import LoadedModel
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules import BenjaminiHochbergDrop

BLOCK = BenjaminiHochbergDrop(0.3, scope="block", block_tokens=16, statistic="contribution")
LENGTHS = (7, 40, 23)
WIDTH = max(LENGTHS)


@pytest.fixture(scope="module")
def calibration(demo: LoadedModel) -> Calibration:
    texts = [document.text for document in packaged_documents("calibration")]
    return calibrate(demo.model, demo.tokenizer, texts, nulls=("needed",), max_tokens=6_000)


@pytest.fixture(scope="module")
def sequences(demo: LoadedModel) -> list[Tensor]:
    ids = demo.tokenizer(packaged_documents("evaluation")[0].text)["input_ids"]
    return [torch.tensor([ids[10 * n : 10 * n + length]]) for n, length in enumerate(LENGTHS)]


def padded(sequences: list[Tensor], side: str) -> dict[str, Tensor]:
    ids_BS = torch.zeros(len(sequences), WIDTH, dtype=torch.long)
    mask_BS = torch.zeros_like(ids_BS)
    for row, ids_1S in enumerate(sequences):
        length = ids_1S.shape[1]
        part = slice(WIDTH - length, WIDTH) if side == "left" else slice(length)
        ids_BS[row, part], mask_BS[row, part] = ids_1S[0], 1
    return {"input_ids": ids_BS, "attention_mask": mask_BS}


def counts(demo: LoadedModel, calibration: Calibration, run: Callable[[], Any]) -> Tensor:
    with route(demo.model, BLOCK, calibration) as trace, torch.inference_mode():
        run()
    return trace.expert_counts


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", ["forward", "generate", "static cache", "embeddings"])
def test_blocks_are_those_of_the_sequence_alone_whatever_the_batch(
    demo: LoadedModel, calibration: Calibration, sequences: list[Tensor], side: str, way: str
) -> None:
    model, batch = demo.model, padded(sequences, side)
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    if way == "static cache":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    mask_BS = batch["attention_mask"]
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    run = {
        # Positions as `generate` counts them, so that left padding changes nothing else.
        "forward": lambda: model(**batch, position_ids=(mask_BS.cumsum(-1) - 1).clamp_min(0)),
        "embeddings": lambda: model(inputs_embeds=embeddings, attention_mask=mask_BS),
    }.get(way, lambda: model.generate(**batch, **settings))
    together = counts(demo, calibration, run)[: sum(LENGTHS)].split(LENGTHS)
    different = 0
    for own, ids_1S in zip(together, sequences, strict=True):
        alone = counts(demo, calibration, lambda ids=ids_1S: model(ids))  # type: ignore[misc]
        different += int((own != alone).sum())
    # Another batch adds up in another order; a slot on the line may fall on its other side.
    assert different <= 0.005 * sum(own.numel() for own in together)


def test_packed_sequences_are_blocks_of_their_own(
    demo: LoadedModel, calibration: Calibration, sequences: list[Tensor]
) -> None:
    model = demo.model
    places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = torch.cat(sequences, dim=1)
    run = lambda: model(packed, position_ids=places, use_cache=False)  # noqa: E731
    together = counts(demo, calibration, run).split(LENGTHS)
    for ids_1S, own in zip(sequences, together, strict=True):
        alone = counts(demo, calibration, lambda ids=ids_1S: model(ids))  # type: ignore[misc]
        assert int((own != alone).sum()) <= 0.005 * own.numel()


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_scores_of_a_document_do_not_depend_on_the_batch(
    demo: LoadedModel, calibration: Calibration, batch_size: int | None
) -> None:
    documents = tokenize_documents(demo.tokenizer, packaged_documents("evaluation")[:4], None)
    pieces = [
        TokenizedDocument(
            key="d:0", name=d.name, cluster=d.cluster, domain=d.domain, ids=d.ids[: 30 + 50 * n]
        )
        for n, d in enumerate(documents)
    ]

    def experts(size: int | None) -> list[float]:
        records = score(
            demo.model, demo.tokenizer, pieces, {"block": BLOCK}, calibration,
            window=99, stride=99, batch_size=size,  # no multiple of a block
        )  # fmt: skip
        return [r.experts_sum / r.units for r in records]

    assert experts(batch_size) == pytest.approx(experts(4), abs=0.01)


def test_the_engine_decodes_a_text_alike_alone_and_among_others(
    demo: LoadedModel, calibration: Calibration, sequences: list[Tensor]
) -> None:
    prompts = [ids_1S[0].tolist() for ids_1S in sequences]
    together = decode_greedily(demo.model, prompts, BLOCK, calibration, max_new_tokens=6)
    for row, prompt in enumerate(prompts):
        alone = decode_greedily(demo.model, [prompt], BLOCK, calibration, max_new_tokens=6)
        assert alone.token_ids[0] == together.token_ids[row]
        assert torch.equal(alone.traces[0].kept_index, together.traces[row].kept_index)


def test_proposals_of_several_windows_are_decided_window_by_window(
    demo: LoadedModel, calibration: Calibration, sequences: list[Tensor]
) -> None:
    documents = [
        TokenizedDocument(
            key="d:0", name=str(n), cluster=str(n), domain="x", ids=ids_1S[0].tolist()
        )
        for n, ids_1S in enumerate(sequences)
    ]
    routers = find_routers(demo.model)

    def mean(parts: list[TokenizedDocument]) -> float:
        proposals = capture_proposals(
            demo.model, demo.tokenizer, parts, window=32, num_candidates=routers.model_top_k
        )
        return mean_experts(BLOCK, proposals, routers, calibration)

    apart = sum(mean([d]) * len(d.ids) for d in documents) / sum(LENGTHS)
    assert mean(documents) == pytest.approx(apart, abs=1e-9)
