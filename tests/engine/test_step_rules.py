"""Rules on decode steps in a model: calibration, batched generation with left padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.steps import draw_steps
from bh_routing.engine.texts import packaged_documents
from bh_routing.errors import CalibrationError
from bh_routing.models import find_routers, load_model, route
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.contributions import ALL_STEPS, NEEDED_STEPS, STEP_SIZES, STEPS
from bh_routing.rules import (
    BenjaminiHochbergDrop,
    ContributionThreshold,
    ExpertBudget,
    FisherMass,
    OpportunisticActivation,
    Rule,
    TopK,
)

RULE = BenjaminiHochbergDrop(0.4, scope="step")


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def calibration(demo: Any) -> Calibration:
    texts = packaged_documents("calibration")[:40]
    return calibrate(demo[0], demo[1], texts, rules=[RULE], max_tokens=6_000)


def test_steps_are_calibrated_and_survive_the_file(
    calibration: Calibration, tmp_path: Path
) -> None:
    assert STEPS in calibration.nulls
    assert calibration.contributions is not None
    for name in (NEEDED_STEPS, ALL_STEPS):
        table_BN = calibration.contributions.steps[name]
        assert len(table_BN) == len(STEP_SIZES)
        assert bool((table_BN.diff(dim=-1) >= 0).all())
        assert bool((table_BN.median(dim=-1).values.diff() > 0).all()), "masses grow with the step"
    read = Calibration.load(calibration.save(tmp_path / "steps.safetensors"))
    assert read.fingerprint == calibration.fingerprint
    assert read.table_fingerprints == calibration.table_fingerprints


def test_a_calibration_of_slots_alone_is_rejected(demo: Any) -> None:
    texts = packaged_documents("calibration")[:40]
    old = calibrate(demo[0], demo[1], texts, nulls=["needed_by_loss"], max_tokens=6_000)
    with (
        pytest.raises(CalibrationError, match=r"needed_steps.*calibrate\("),
        route(demo[0], RULE, old),
    ):
        pass
    with route(demo[0], FisherMass(0.1), old):
        pass


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        BenjaminiHochbergDrop(0.4, scope="step_population"),
        FisherMass(0.25),
        ExpertBudget(16),
        FisherMass(0.25, refill=16),
        OpportunisticActivation(3, refill=64),
    ],
    ids=str,
)
def test_sequences_of_a_padded_batch_can_be_given_in_any_order(
    rule: Rule, demo: Any, calibration: Calibration
) -> None:
    model, tokenizer = demo
    prompts = ["The castle", "A recipe for bread begins with", "In 1902 the two of them"]
    tokenizer.padding_side = "left"
    texts: list[list[str]] = []
    experts: list[int] = []
    for order in ([0, 1, 2], [2, 0, 1]):
        inputs = tokenizer([prompts[i] for i in order], return_tensors="pt", padding=True)
        with route(model, rule, calibration) as trace:
            ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        written = tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts.append([written[order.index(i)] for i in range(3)])
        experts.append(int(trace.distinct_experts.sum()))
    assert texts[0] == texts[1]
    assert experts[0] == experts[1]
    with route(model, TopK(8)) as own:
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert experts[0] < int(own.distinct_experts.sum())


@pytest.mark.parametrize("refill", [12, 64])
def test_refilled_slots_have_the_routers_own_weights_and_read_nothing_more(
    refill: int, demo: Any, calibration: Calibration
) -> None:
    model, tokenizer = demo
    inputs = tokenizer(["The castle was", "A recipe for bread"], return_tensors="pt", padding=True)
    first = find_routers(model).sites[0]
    given: list[list[torch.Tensor]] = []

    def watch(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        given.append(list(arguments))

    mask_BS = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=-1)
    probabilities, reads, experts = [], [], []
    for rule in (TopK(64), FisherMass(0.25), FisherMass(0.25, refill=refill)):
        past = model(**inputs, use_cache=True).past_key_values
        given.clear()
        hook = first.experts.register_forward_pre_hook(watch)
        with route(model, rule, calibration) as trace:
            model(torch.tensor([[42], [57]]), attention_mask=mask_BS, past_key_values=past)
        hook.remove()
        _, index_TK, weights_TK = given[0]
        # The weight of a dropped slot is 0, so an expert's weights add up to its own.
        probabilities.append(torch.zeros(2, 64).scatter_add(1, index_TK, weights_TK))
        reads.append(set(trace.kept_index[:, 0][trace.kept_index[:, 0] >= 0].tolist()))
        experts.append(trace.expert_counts[:, 0])
    everything, narrow, wide = probabilities
    assert torch.equal(wide, torch.where(wide > 0, everything, 0.0))
    assert torch.equal(narrow, torch.where(narrow > 0, wide, 0.0))
    assert reads[1] == reads[2]
    assert bool((experts[2] >= experts[1]).all()) and int(experts[2].max()) <= 8
    assert int(experts[2].sum()) > int(experts[1].sum())


def test_tokens_of_a_drawn_step_come_from_different_documents() -> None:
    document_T = torch.tensor([0] * 50 + [1] * 3 + [2] * 20 + [5] * 7)
    token_SB = draw_steps(document_T, 500, 3, seed=1)
    drawn_SB = document_T[token_SB]
    assert all(len(set(row)) == 3 for row in drawn_SB.tolist())
    assert set(token_SB.flatten().tolist()) == set(range(80))
    assert torch.equal(token_SB, draw_steps(document_T, 500, 3, seed=1))
    # Six tokens of four documents: none gives more than two.
    for row in document_T[draw_steps(document_T, 100, 6, seed=1)].tolist():
        assert sorted(row.count(document) for document in (0, 1, 2, 5)) == [1, 1, 2, 2]


@pytest.mark.parametrize("ended", ["eos_token_id", "pad_token_id"])
def test_a_sequence_that_has_ended_leaves_the_step(
    ended: str, demo: Any, calibration: Calibration
) -> None:
    model, tokenizer = demo
    end_id = getattr(model.generation_config, ended)
    if end_id is None:
        end_id = model.generation_config.eos_token_id
    inputs = tokenizer(["The castle was", "A recipe for bread"], return_tensors="pt", padding=True)
    mask_BS = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=-1)

    def kept(rule: Rule, first: int) -> torch.Tensor:
        past = model(**inputs, use_cache=True).past_key_values
        with route(model, rule, calibration) as trace:
            token_B1 = torch.tensor([[first], [42]])
            model(token_B1, attention_mask=mask_BS, past_key_values=past)
        return trace.kept_index

    by_step, by_token = FisherMass(0.3), ContributionThreshold(0.3)
    assert torch.equal(kept(by_step, end_id)[1], kept(by_token, end_id)[1])
    assert bool((kept(by_step, end_id)[0] >= 0).sum(-1).eq(1).all())
    assert not torch.equal(kept(by_step, 43)[1], kept(by_token, 43)[1])


def test_a_prompt_of_one_token_has_not_ended(demo: Any, calibration: Calibration) -> None:
    model, _ = demo
    ids_B1 = torch.tensor([[model.generation_config.eos_token_id]])
    rules = FisherMass(0.0), TopK(8)
    kept = []
    for rule in rules:
        with route(model, rule, calibration) as trace:
            model(ids_B1, attention_mask=torch.ones_like(ids_B1))
        kept.append(int((trace.kept_index >= 0).sum()))
    assert kept[0] == kept[1]
