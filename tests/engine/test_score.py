"""Scores agree with transformers' own loss, add up, and cost what they promise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bh_routing.engine.score import score
from bh_routing.engine.tally import DocumentTally, compare_predictions, predict
from bh_routing.engine.texts import Document
from bh_routing.engine.windows import TokenizedDocument, prefix_token, tokenize_documents
from bh_routing.models import LoadedModel, find_routers
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.fixed import TopK

TEXTS = (
    "The mitochondrion is the part of the cell that makes energy. " * 12,
    "def add(a, b): return a + b",
    "It was a dark night, and the wind blew over the moor while the old house creaked. " * 30,
)
DOCUMENTS = [Document(f"d{i}", text, f"d{i}", "test") for i, text in enumerate(TEXTS)]
RULES: dict[str, Rule] = {
    "own": TopK(k=8),
    "four": TopK(k=4),
    "bh": BenjaminiHochberg(alpha=0.05),
}


def run(
    demo: LoadedModel, calibration: Calibration, rules: dict[str, Rule], **options: Any
) -> dict[tuple[str, str], QualityRecord]:
    documents = tokenize_documents(demo.tokenizer, DOCUMENTS, options.pop("max_tokens", None))
    settings = {"window": 256, "stride": 256} | options
    records = score(demo.model, demo.tokenizer, documents, rules, calibration, **settings)
    return {(r.config_name, r.document): r for r in records}


@pytest.fixture(scope="module")
def records(
    demo: LoadedModel, demo_calibration: Calibration
) -> dict[tuple[str, str], QualityRecord]:
    return run(demo, demo_calibration, RULES)


def test_top_k_nll_equals_transformers_own_loss(
    demo: LoadedModel, records: dict[tuple[str, str], QualityRecord]
) -> None:
    ids = [prefix_token(demo.tokenizer), *demo.tokenizer(TEXTS[1])["input_ids"]]
    inputs = torch.tensor([ids])
    with torch.inference_mode():
        loss = float(demo.model(input_ids=inputs, labels=inputs).loss)
    record = records["four", "d1"]
    assert record.tokens == len(ids) - 1
    assert record.top_k_nll_sum / record.tokens == pytest.approx(loss, rel=1e-6)


def test_a_rule_that_is_the_models_own_top_k_loses_exactly_nothing(
    records: dict[tuple[str, str], QualityRecord],
) -> None:
    for name in ("d0", "d1", "d2"):
        record = records["own", name]
        assert record.nll_sum == record.top_k_nll_sum
        assert record.kl_sum == record.kl_max == record.delta_p_sum == 0.0
        assert record.same_top1 == record.tokens
        assert record.jaccard_sum == [record.tokens] * 6


def test_fewer_experts_diverge_and_keep_subsets(
    records: dict[tuple[str, str], QualityRecord],
) -> None:
    record = records["four", "d2"]
    assert record.experts_sum == 4 * record.units == 4 * 6 * record.tokens
    assert record.kl_sum > 0
    # In the first layer both see the same hidden state: 4 of 8 experts, exactly.
    assert record.jaccard_sum[0] / record.tokens == pytest.approx(0.5)
    assert record.jaccard_sum[-1] / record.tokens < 0.5


def test_each_token_is_scored_once_whatever_the_stride(
    demo: LoadedModel,
    demo_calibration: Calibration,
    records: dict[tuple[str, str], QualityRecord],
) -> None:
    overlapping = run(demo, demo_calibration, {"four": TopK(k=4)}, window=256, stride=64)
    for name in ("d0", "d1", "d2"):
        assert overlapping["four", name].tokens == records["four", name].tokens
    # More context predicts better.
    assert overlapping["four", "d2"].top_k_nll_sum < records["four", "d2"].top_k_nll_sum


def test_batching_changes_nothing_but_rounding(
    demo: LoadedModel,
    demo_calibration: Calibration,
    records: dict[tuple[str, str], QualityRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bh_routing.engine.score.BATCH_TOKENS", 1)
    alone = run(demo, demo_calibration, RULES)
    for key, record in records.items():
        assert alone[key].nll_sum == pytest.approx(record.nll_sum, rel=1e-5)
        assert alone[key].experts_sum == pytest.approx(record.experts_sum, rel=1e-3)


def test_padding_is_never_counted_whatever_the_batch_size(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    # Full windows, tails and a short document meet in one batch of uneven lengths.
    settings = {"window": 100, "stride": 100, "max_tokens": 260}
    rules = {name: RULES[name] for name in ("four", "bh")}
    alone = run(demo, demo_calibration, rules, **settings, batch_size=1)
    together = run(demo, demo_calibration, rules, **settings, batch_size=8)
    for key, record in alone.items():
        found = together[key]
        for name in ("tokens", "units", "experts_sum", "expert_load", "count_histogram"):
            assert getattr(found, name) == getattr(record, name), name
        for name in ("nll_sum", "top_k_nll_sum", "kl_sum"):
            assert getattr(found, name) == pytest.approx(getattr(record, name), rel=1e-5)


def test_a_batch_size_is_the_most_windows_of_a_forward_pass(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    sizes = []
    handle = demo.model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(inputs["input_ids"].shape[0]), with_kwargs=True
    )
    run(demo, demo_calibration, {"own": TopK(k=8)}, window=60, stride=60, batch_size=3)
    handle.remove()
    assert set(sizes[:-1]) == {3}
    assert 1 <= sizes[-1] <= 3


def test_a_budget_is_spread_over_documents(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    records = run(demo, demo_calibration, {"four": TopK(k=4)}, max_tokens=100)
    assert sum(r.tokens for r in records.values()) in range(90, 101)
    assert len(records) == 3


def test_r_rules_cost_r_plus_one_forwards_and_the_models_own_none(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    calls = []
    router = find_routers(demo.model).sites[0].module
    handle = router.register_forward_hook(lambda *_: calls.append(1))
    run(demo, demo_calibration, RULES, max_tokens=60)
    handle.remove()
    assert len(calls) == 3  # baseline, four, bh


def test_kl_is_never_below_rounding_and_matches_torch_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    top_k = torch.randn(200, 5000, generator=generator) * 3
    rule = top_k + 0.1 * torch.randn(200, 5000, generator=generator)
    targets = torch.randint(5000, (200,), generator=generator)
    scores = compare_predictions(predict(top_k, targets), rule)
    p, q = top_k.double().log_softmax(-1), rule.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    assert scores.kl_T.min() >= -1e-6
    torch.testing.assert_close(scores.kl_T.double(), expected, rtol=1e-4, atol=1e-6)


def test_masked_tokens_add_nothing_to_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    top_k, rule = torch.randn(2, 20, 300, generator=generator).unbind(0)
    targets = torch.randint(200, (20,), generator=generator)
    whole = compare_predictions(predict(top_k[:, :200], targets), rule[:, :200])
    top_k[:, 200:] = rule[:, 200:] = -torch.inf
    masked = compare_predictions(predict(top_k, targets), rule)
    torch.testing.assert_close(masked.kl_T, whole.kl_T)


def test_a_token_that_only_the_rule_rules_out_diverges_without_bound() -> None:
    top_k, rule = torch.zeros(2, 1, 4).unbind(0)
    rule[0, 3] = -torch.inf
    scores = compare_predictions(predict(top_k, torch.tensor([0])), rule)
    assert scores.kl_T.tolist() == [torch.inf]


def test_nan_reaches_the_largest_divergence() -> None:
    tally = DocumentTally(num_layers=1, num_experts=2)
    kept = torch.zeros(3, 1, 1, dtype=torch.long)
    zeros = np.zeros(3, dtype=np.float32)
    for kl in ([0.1, np.nan, 0.2], [0.3, 0.1, 0.2]):
        tally.add(
            zeros, zeros, np.array(kl, dtype=np.float32), zeros == 0, zeros,
            first_position=0, kept_index_TLK=kept, top_k_index_TLK=kept,
        )  # fmt: skip
    document = TokenizedDocument(key="d:0", name="d", cluster="d", domain="x", ids=[1, 2, 3])
    assert np.isnan(tally.record("a", TopK(k=1), document).kl_max)
