"""One table an expert: what goes into it, its p-values, and what a calibration can't decide.

Axes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.errors import CalibrationError, InputError
from bh_routing.models.load import LoadedModel
from bh_routing.models.routing import route
from bh_routing.nulls import Calibration, ReferenceTable, Reservoir, RouterPass, get_null, p_values
from bh_routing.nulls.cut_offs import MIN_TOKENS
from bh_routing.nulls.reservoir import row_capacity
from bh_routing.rules import BenjaminiHochberg, HigherCriticism, LayerContext
from tests.nulls.test_calibration import check, make, rewrite
from tests.rules.proposals import kept_experts, propose

NULL = get_null("per_expert")


def logits_with_a_favourite(num_tokens: int, seed: int, num_experts: int = 16) -> Tensor:
    """Noise in which expert 0 is always two standard deviations up."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    logits_TE[:, 0] += 2.0
    return logits_TE


def table_of(logits_TE: Tensor, k: int = 4) -> ReferenceTable:
    return NULL.table_of(RouterPass(logits_TE, logits_TE.topk(k).indices))


def test_a_table_holds_the_scores_of_its_expert_outside_the_top_k() -> None:
    logits_TE = logits_with_a_favourite(300, seed=0)
    table = table_of(logits_TE)
    is_inside_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    is_inside_TE.scatter_(-1, logits_TE.topk(4).indices, True)
    scores_TE = NULL.score(logits_TE)
    size = int((~is_inside_TE).sum(dim=0).min())  # the favourite is outside most rarely
    assert len(table) == size == int((~is_inside_TE)[:, 0].sum())
    for expert in range(16):
        outside = scores_TE[~is_inside_TE[:, expert], expert][:size]
        assert torch.equal(table.sorted_scores_N[expert], outside.sort().values)


def test_p_values_rank_each_score_within_its_own_expert() -> None:
    table = table_of(logits_with_a_favourite(300, seed=0))
    scores_TE = NULL.score(logits_with_a_favourite(50, seed=1)).reshape(2, 25, 16)
    p_TE = NULL.p_from_score(scores_TE, table)
    for expert in range(16):
        reference = np.sort(table.sorted_scores_N[expert].numpy())
        above = (reference[None, :] >= scores_TE[..., expert].reshape(-1, 1).numpy()).sum(axis=1)
        expected = (1 + above) / (1 + len(reference))
        assert p_TE[..., expert].flatten().tolist() == expected.tolist()


def test_the_order_of_p_values_may_differ_from_that_of_the_logits() -> None:
    # All scores as reference, not only those outside the top-k, so that the favourite's is high.
    table = ReferenceTable.by_expert(NULL.score(logits_with_a_favourite(20_000, seed=0)))
    logits_1E = torch.linspace(-1, 1, 16).flip(0).unsqueeze(0)
    logits_1E[0, :2] = torch.tensor([3.6, 3.5])  # usual for expert 0, rare for expert 1
    rule = BenjaminiHochberg(0.05, null="per_expert", max_k=4)
    context = LayerContext(
        layer=0, num_experts=16, model_top_k=4, device=torch.device("cpu"), table=table
    )
    candidates = propose(logits_1E, 4, shuffled=True)
    kept_1E = kept_experts(candidates, rule.bind(context)(candidates))
    assert kept_1E[0].nonzero().flatten().tolist() == [1]


def test_a_rejected_expert_that_was_not_proposed_is_not_replaced() -> None:
    scores_TE = torch.linspace(-3, 3, 99).unsqueeze(-1).repeat(1, 8)
    scores_TE[:, 5] -= 10.0  # whatever expert 5 scores is unheard of
    scores_TE[:, :5] += 10.0  # and what the best score is usual
    context = LayerContext(
        layer=0,
        num_experts=8,
        model_top_k=3,
        device=torch.device("cpu"),
        table=ReferenceTable.by_expert(scores_TE),
    )
    candidates = propose(torch.linspace(3, -3, 8).unsqueeze(0), 3)
    rule = BenjaminiHochberg(0.2, null="per_expert", max_k=3)
    p_1E = p_values(candidates.router_logits_TE, "per_expert", context.table)
    assert int(p_1E.argmin()) == 5
    assert int(rule.bind(context)(candidates).sum()) == rule.min_k


def test_scores_of_another_number_of_experts_are_refused() -> None:
    table = table_of(logits_with_a_favourite(300, seed=0))
    with pytest.raises(CalibrationError, match=r"has 16 experts, scores have shape \(2, 8\)"):
        p_values(torch.zeros(2, 8), "per_expert", table)


def test_an_expert_that_is_always_selected_is_named() -> None:
    logits_TE = logits_with_a_favourite(50, seed=0)
    logits_TE[:, 3] += 100
    with pytest.raises(CalibrationError, match="expert 3 is among the model's top-k of every"):
        table_of(logits_TE)


def test_rows_stay_together_in_a_sample_that_does_not_depend_on_chunks() -> None:
    rows = torch.arange(600.0).reshape(200, 3)
    samples = []
    for size in (7, 200):
        reservoir = Reservoir(20, seed=1, row_length=3)
        for chunk in rows.split(size):
            reservoir.add(chunk)
        assert len(reservoir) == 20 and reservoir.num_seen == 200
        samples.append(reservoir.rows())
    assert torch.equal(*samples)
    assert bool((samples[0].diff(dim=-1) == 1).all())
    assert not torch.equal(samples[0], samples[0].sort(dim=0).values)


def by_expert_calibration(size: int = 2_000, num_experts: int = 8, **changes: int) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    tables = tuple(
        ReferenceTable.by_expert(torch.randn(size, num_experts, generator=generator))
        for _ in range(2)
    )
    return make(tables={"per_expert": tables}, num_experts=num_experts, **changes)


def test_tables_by_expert_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved = by_expert_calibration()
    loaded = Calibration.load(saved.save(tmp_path / "calibration.safetensors"))
    assert loaded.fingerprint == saved.fingerprint
    ours, theirs = saved.table("per_expert", 1), loaded.table("per_expert", 1)
    assert torch.equal(ours.sorted_scores_N, theirs.sorted_scores_N)
    assert len(theirs) == 2_000


def test_a_table_of_other_experts_is_refused(tmp_path: Path) -> None:
    path = by_expert_calibration().save(tmp_path / "calibration.safetensors")
    rewrite(path, lambda tensors, _: tensors.update({"per_expert.1": torch.zeros(4, 4_000)}))
    with pytest.raises(CalibrationError, match=r"must be of shape \(8, N\), got"):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (0.05, r"hold 14000 scores and 25600 are needed; use alpha >= 0.092, or run: bh_routing"
               r".calibrate\(model, tokenizer, texts, nulls=\['per_expert'\], max_tokens=31458\)$"),
        (0.01, r"128000 are needed; use alpha >= 0.092, or another null: tables by expert can't"),
    ],
)  # fmt: skip
def test_an_alpha_out_of_reach_is_refused_with_the_tokens_it_takes(
    alpha: float, message: str
) -> None:
    calibration = by_expert_calibration(14_000, 64, num_tokens=16_384)
    check(calibration, null="per_expert", alpha=0.1, num_experts=64)
    with pytest.raises(CalibrationError, match=message):
        check(calibration, null="per_expert", alpha=alpha, num_experts=64)


def test_memory_is_bounded_by_rows() -> None:
    assert row_capacity(64) == 2 * 20 * 64 / 0.05


def test_higher_criticism_refuses_tables_by_expert() -> None:
    with pytest.raises(InputError, match="null 'per_expert' has one an expert; use method bh"):
        HigherCriticism(2.0, null="per_expert")


def test_the_demo_is_routed_under_tables_by_expert(
    demo: LoadedModel, demo_inputs: dict[str, Any], tmp_path: Path
) -> None:
    texts = [document.text for document in packaged_documents("calibration")]
    calibration = calibrate(
        demo.model, demo.tokenizer, texts, nulls=("per_expert",), max_tokens=2_600
    )
    # As if from more text: less is refused, and more takes longer than a test should.
    calibration = replace(calibration, num_tokens=MIN_TOKENS)
    calibration = Calibration.load(calibration.save(tmp_path / "calibration.safetensors"))
    assert calibration.table("per_expert", 0).sorted_scores_N.shape[0] == 64
    assert set(calibration.observed) == {"gaussian", "per_expert"}
    rule = BenjaminiHochberg(0.95, null="per_expert")
    with torch.inference_mode(), route(demo.model, rule, calibration) as trace:
        demo.model(**demo_inputs)
    counts = trace.expert_counts
    assert 1 <= int(counts.min()) <= int(counts.max()) == 8
