"""What calibration observes of slots, against the model's own arithmetic."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.observe import SlotObserver
from bh_routing.engine.texts import packaged_documents
from bh_routing.errors import CalibrationError
from bh_routing.models import find_routers, route
from bh_routing.models.load import LoadedModel
from bh_routing.nulls import Calibration
from bh_routing.rules import BenjaminiHochbergDrop, ContributionThreshold, OracleContribution

TOKENS = 5_040


@pytest.fixture(scope="module")
def observed(demo: LoadedModel) -> Calibration:
    texts = [document.text for document in packaged_documents("calibration")]
    return calibrate(demo.model, demo.tokenizer, texts, nulls=("needed",), max_tokens=TOKENS)


@pytest.fixture
def ids(demo: LoadedModel) -> Iterator[Tensor]:
    yield demo.tokenizer("The old man walked down to the river.", return_tensors="pt")["input_ids"]


def test_a_slots_norm_is_that_of_its_expert_run_by_hand(demo: LoadedModel, ids: Tensor) -> None:
    routers = find_routers(demo.model)
    observer = SlotObserver(demo.model, routers, by_loss=False)
    seen: list[tuple[Tensor, ...]] = []
    experts = routers.sites[2].experts
    handle = experts.register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    try:
        norms_TK = observer.read(ids)[2].norms
    finally:
        handle.remove()
        observer.close()
    hidden_TH, index_TK, _ = seen[0]
    expert = int(index_TK[4, 3])
    gate, up = (experts.get_parameter("gate_up_proj")[expert] @ hidden_TH[4]).chunk(2)
    output = experts.get_parameter("down_proj")[expert] @ (torch.nn.functional.silu(gate) * up)
    assert float(norms_TK[4, 3]) == pytest.approx(float(output.norm()), rel=1e-4)


def test_the_residual_is_what_the_decoder_layer_returns(demo: LoadedModel, ids: Tensor) -> None:
    observer = SlotObserver(demo.model, find_routers(demo.model), by_loss=False)
    try:
        residuals_TK = observer.read(ids)[1].residuals
    finally:
        observer.close()
    states = demo.model(ids, output_hidden_states=True).hidden_states
    assert torch.allclose(residuals_TK[:, 0], states[2][0].norm(dim=-1), rtol=1e-5)


def test_the_loss_of_a_slot_is_the_size_of_the_slope_along_its_weight(
    demo: LoadedModel, ids: Tensor
) -> None:
    def loss() -> Tensor:
        logits = demo.model(ids).logits[0, :-1].float()
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")

    routers = find_routers(demo.model)
    observer = SlotObserver(demo.model, routers, by_loss=True)
    try:
        size = float(observer.read(ids)[1].losses[3, 0])
    finally:
        observer.close()

    def scaled(by: float) -> float:
        def hook(_: object, __: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            weights_TK = output[1].clone()
            weights_TK[3, 0] *= by
            return (output[0], weights_TK, *output[2:])

        handle = routers.sites[1].module.register_forward_hook(hook)
        try:
            return float(loss())
        finally:
            handle.remove()

    slope = (scaled(1.05) - scaled(0.95)) / 0.1
    assert size == pytest.approx(abs(slope), rel=0.05, abs=1e-3)


def test_observing_leaves_the_model_as_it_was(demo: LoadedModel, ids: Tensor) -> None:
    before = demo.model(ids).logits
    texts = [document.text for document in packaged_documents("calibration")]
    nulls = ("needed_by_loss",)
    first = calibrate(demo.model, demo.tokenizer, texts, nulls=nulls, max_tokens=200)
    assert torch.equal(demo.model(ids).logits, before)
    assert all(parameter.grad is None for parameter in demo.model.parameters())
    assert first.nulls == ("needed", "needed_by_loss")


def test_half_of_all_slots_mattered(observed: Calibration) -> None:
    slots = observed.contributions
    assert slots is not None
    num_all, num_needed = (
        len(slots.all_of("weight")),
        len(slots.needed("weight", "norm")),
    )
    assert num_all == observed.num_tokens * observed.num_layers * observed.model_top_k
    assert abs(num_needed / num_all - 0.5) < 1e-4


def test_what_mattered_is_above_the_cut_that_calibration_keeps(
    demo: LoadedModel, observed: Calibration, ids: Tensor
) -> None:
    slots = observed.contributions
    assert slots is not None
    observer = SlotObserver(demo.model, find_routers(demo.model), by_loss=False)
    try:
        layers = observer.read(ids)
    finally:
        observer.close()
    truth = torch.stack([layer.truth("norm") for layer in layers])
    assert set(slots.cuts) == {"norm"}
    assert 0.3 < float((truth > slots.cuts["norm"]).double().mean()) < 0.7


def test_a_calibration_of_slots_comes_back_from_its_file(
    observed: Calibration, tmp_path: Path
) -> None:
    loaded = Calibration.load(observed.save(tmp_path / "calibration.safetensors"))
    assert loaded.fingerprint == observed.fingerprint
    assert loaded.nulls == ("needed",)
    assert loaded.contributions is not None
    assert observed.contributions is not None
    assert loaded.contributions.cuts == observed.contributions.cuts
    assert loaded.resolution("needed") == observed.resolution("needed")


def test_a_loss_that_was_not_calibrated_is_refused_by_name(
    demo: LoadedModel, observed: Calibration
) -> None:
    rule = BenjaminiHochbergDrop(0.2)
    sentence = (
        "no table of null 'needed_by_loss', only of: needed; run: bh_routing.calibrate(model, "
        "tokenizer, texts, nulls=['background', 'needed_by_loss']), or use statistic: contribution"
    )
    with (
        pytest.raises(CalibrationError, match=re.escape(sentence)),
        route(demo.model, rule, observed),
    ):
        pass


def test_a_model_without_gradients_is_refused_by_name(demo: LoadedModel, ids: Tensor) -> None:
    def cut(_: object, __: object, output: Tensor) -> Tensor:
        return output.detach()

    handle = demo.model.model.norm.register_forward_hook(cut)
    observer = SlotObserver(demo.model, find_routers(demo.model), by_loss=True)
    try:
        with pytest.raises(CalibrationError, match=r"no gradients.*use statistic: contribution"):
            observer.read(ids)
    finally:
        observer.close()
        handle.remove()


@pytest.mark.parametrize(
    "rule",
    [
        BenjaminiHochbergDrop(0.3, statistic="contribution"),
        BenjaminiHochbergDrop(0.3, statistic="contribution", scope="block"),
        BenjaminiHochbergDrop(0.3, statistic="contribution", scope="population"),
        ContributionThreshold(0.05, statistic="contribution"),
        OracleContribution(0.05),
    ],
    ids=str,
)
def test_the_demo_model_runs_under_each_dropping_rule(
    demo: LoadedModel,
    observed: Calibration,
    ids: Tensor,
    rule: BenjaminiHochbergDrop | ContributionThreshold | OracleContribution,
) -> None:
    with route(demo.model, rule, observed) as trace:
        demo.model(ids)
    counts_TL = trace.expert_counts
    assert int(counts_TL.min()) >= 1
    assert 1.0 < float(counts_TL.double().mean()) < 8.0
