"""Scores in emulated decode steps on a GPU are those on a CPU: our experts, and joined batches."""

from __future__ import annotations

import pytest
import torch

from bh_routing.engine.score import score
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import tokenize_documents
from bh_routing.models.load import DeviceName, load_model
from bh_routing.results.records import QualityRecord
from bh_routing.rules import ExpertBudget, OpportunisticActivation, Rule, TopK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
RULES: dict[str, Rule] = {
    "four": TopK(4),
    "oea": OpportunisticActivation(3, refill=16),
    "xshare": ExpertBudget(12, refill=16),
}


def records_on(device: DeviceName) -> dict[tuple[str, str], QualityRecord]:
    model, tokenizer = load_model("demo", device=device, dtype="float32")
    documents = tokenize_documents(tokenizer, packaged_documents("evaluation"), 6_000)
    found = score(model, tokenizer, documents, RULES, window=64, stride=64, decode_batch=4)
    return {(r.config_name, r.document_key): r for r in found}


def test_scores_in_steps_are_those_on_a_cpu() -> None:
    expected, found = records_on("cpu"), records_on("cuda")
    assert found.keys() == expected.keys()
    for key, record in expected.items():
        assert found[key].nll_sum == pytest.approx(record.nll_sum, rel=2e-3)
        assert found[key].distinct_experts_sum == pytest.approx(
            record.distinct_experts_sum, rel=5e-3
        )
    # Each sum may differ by a token whose experts tie; all together hardly differ.
    for name in RULES:
        totals = [
            sum(r.nll_sum for (config, _), r in records.items() if config == name)
            for records in (expected, found)
        ]
        assert totals[1] == pytest.approx(totals[0], rel=1e-4)
