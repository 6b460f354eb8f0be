"""What routers propose is kept, and each rule's knob moves its mean one way on it."""

from __future__ import annotations

import pytest
import torch

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.proposals import Proposals, capture_proposals, mean_experts
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, prefix_token, tokenize_documents
from bh_routing.models import LoadedModel, find_routers, route
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules import RULES, TopK, TopP, make_rule

WINDOW = 64
STEP_RULES = ("fisher_mass", "oea", "expert_budget")
"""They drop nothing outside a decode step."""
GIVEN = {"floor_threshold": {"min_k": 1}}
"""Fields without a default that a tuning parameter doesn't set."""


@pytest.fixture(scope="module")
def documents(demo: LoadedModel) -> list[TokenizedDocument]:
    return tokenize_documents(demo.tokenizer, packaged_documents("calibration")[:3], 240)


@pytest.fixture(scope="module")
def proposals(demo: LoadedModel, documents: list[TokenizedDocument]) -> Proposals:
    return capture_proposals(*demo, documents, window=WINDOW, num_candidates=8, with_norms=True)


@pytest.fixture(scope="module")
def small_calibration(demo: LoadedModel) -> Calibration:
    texts = [document.text for document in packaged_documents("calibration")[:3]]
    return calibrate(*demo, texts, nulls=("background", "needed_by_loss"), max_tokens=240)


@pytest.mark.parametrize("method", [name for name in RULES if name not in STEP_RULES])
def test_the_knob_moves_the_mean_one_way(
    demo: LoadedModel, proposals: Proposals, small_calibration: Calibration, method: str
) -> None:
    knob, routers = RULES[method].knob, find_routers(demo.model)
    assert knob is not None
    low, high = knob.scale.ends(routers.model_top_k)
    means = []
    for share in (0.0, 0.25, 0.45, 0.5, 0.55, 0.75, 1.0):
        value = knob.scale.value_at(low + share * (high - low))
        fields = GIVEN.get(method, {}) | knob.fields(value, len(routers.sites))
        rule = make_rule({"method": method, **fields})
        means.append(mean_experts(rule, proposals, routers, small_calibration))
    assert means == sorted(means, reverse=not knob.keeps_more)
    assert min(means) < 2
    assert max(means) > 7


def test_proposals_are_those_of_the_untouched_model(
    demo: LoadedModel, documents: list[TokenizedDocument], proposals: Proposals
) -> None:
    document = documents[0]
    ids = torch.tensor([[prefix_token(demo.tokenizer), *document.ids][:WINDOW]])
    with torch.inference_mode(), route(demo.model, TopK(8)) as trace:
        demo.model(ids, use_cache=False)
    for layer, candidates in enumerate(proposals.layers):
        # By expert: the order of slots is the router's own business.
        first_TK = candidates.top_k_index_TK[: ids.shape[1]].sort(-1).values
        assert torch.equal(first_TK, trace.kept_index[:, layer].long().sort(-1).values)


def test_tokens_that_are_only_context_do_not_count(
    demo: LoadedModel, documents: list[TokenizedDocument], proposals: Proposals
) -> None:
    num_tokens = sum(len(document.ids) for document in documents)
    assert int(proposals.counted_T.sum()) == num_tokens < len(proposals.counted_T)
    only_first = Proposals(proposals.layers, torch.arange(len(proposals.counted_T)) == 0)
    mean = mean_experts(TopP(0.5), only_first, find_routers(demo.model))
    assert mean != mean_experts(TopP(0.5), proposals, find_routers(demo.model))
    assert mean == pytest.approx(round(mean * 6) / 6)  # one token in six layers
