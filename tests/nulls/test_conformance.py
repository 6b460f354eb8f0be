"""What every null must do, checked on every null of the catalog.

Axes: T tokens, E experts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.multitest import Procedure, count_rejected
from bh_routing.multitest.step_up import ranks
from bh_routing.nulls import NULLS, Null, ReferenceTable, RouterPass, count_at_cut_offs, cut_offs
from bh_routing.nulls.cut_offs import count_at_storey_cut_offs, storey_cut_offs
from tests.rules.proposals import OneDevice

EVERY_NULL = pytest.mark.parametrize("null", NULLS.values(), ids=NULLS.keys())
TABLED = [null for null in NULLS.values() if null.needs_table]
ONE_TABLE = [null for null in NULLS.values() if not null.by_expert]
"""Nulls whose p-value depends on the score alone, so that cut-offs exist."""
WITH_CUT_OFFS = pytest.mark.parametrize("null", ONE_TABLE, ids=lambda null: null.name)


def noise(num_tokens: int, num_experts: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


def table_for(null: Null, num_experts: int, seed: int = 0) -> ReferenceTable | None:
    """A coarse table, so that scores meet its entries exactly."""
    if not null.needs_table:
        return None
    logits_TE = noise(500, num_experts, seed).to(torch.bfloat16)
    k = max(1, num_experts // 4)
    if k < num_experts and not null.needs_gate:
        return null.table_of(RouterPass(logits_TE, logits_TE.topk(k).indices))
    return ReferenceTable.from_scores(null.score(logits_TE))


@EVERY_NULL
def test_a_score_is_float32_and_never_falls_as_the_logit_rises(null: Null) -> None:
    logits_TE = noise(50, 64, 1)
    scores_TE = null.score(logits_TE)
    assert scores_TE.dtype == torch.float32
    by_logit = scores_TE.gather(-1, logits_TE.argsort(dim=-1))
    assert bool((by_logit.diff(dim=-1) >= 0).all())


@EVERY_NULL
def test_p_values_lie_in_0_to_1_in_float64_and_never_rise_with_the_score(null: Null) -> None:
    table = table_for(null, 64)
    rising_TE = null.score(noise(200, 64, 2)).sort(dim=0).values  # of each expert
    p_TE = null.p_from_score(rising_TE, table)
    assert p_TE.dtype == torch.float64
    assert bool(((p_TE >= 0) & (p_TE <= 1)).all())
    assert bool((p_TE.diff(dim=0) <= 0).all())


@WITH_CUT_OFFS
def test_p_values_never_rise_with_the_score_across_experts(null: Null) -> None:
    rising = null.score(noise(200, 64, 2)).flatten().sort().values
    assert bool((null.p_from_score(rising, table_for(null, 64)).diff() <= 0).all())


@EVERY_NULL
@pytest.mark.parametrize("num_experts", [1, 2, 5, 8, 64])
def test_descending_scores_are_the_sorted_scores_bit_for_bit(null: Null, num_experts: int) -> None:
    logits_TE = noise(100, num_experts, 3)
    logits_TE[::3] = logits_TE[::3].round()
    expected_TE = null.score(logits_TE, 1.7).sort(dim=-1, descending=True).values
    assert torch.equal(null.descending_scores(logits_TE, 1.7), expected_TE)


@EVERY_NULL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_depend_on_the_values_and_not_on_their_dtype(null: Null, dtype: torch.dtype) -> None:
    logits_TE = noise(40, 16, 4).to(torch.bfloat16)
    assert torch.equal(null.score(logits_TE.to(dtype)), null.score(logits_TE.float()))


@EVERY_NULL
def test_tokens_are_scored_independently_of_each_other(null: Null) -> None:
    logits_TE = noise(60, 64, 5)
    order_T = torch.randperm(60, generator=torch.Generator().manual_seed(6))
    assert torch.equal(null.score(logits_TE)[order_T], null.score(logits_TE[order_T]))
    assert torch.equal(null.score(logits_TE)[:1], null.score(logits_TE[:1]))


@EVERY_NULL
def test_a_constant_added_to_a_token_changes_nothing(null: Null) -> None:
    logits_TE = noise(40, 16, 7).round()  # whole numbers: adding 8 is exact
    shifted_TE = null.score(logits_TE + 8)
    assert torch.allclose(shifted_TE, null.score(logits_TE), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    null=st.sampled_from(ONE_TABLE),
    procedure=st.sampled_from(["bh", "by", "storey"]),
    num_experts=st.sampled_from([1, 2, 3, 8, 33, 64]),
    alpha=st.one_of(st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5, 0.75]), st.floats(1e-4, 0.999)),
    precision=st.sampled_from(["float32", "bfloat16", "rounded"]),
    seed=st.integers(0, 1_000),
)
def test_counting_at_cut_offs_equals_counting_p_values(
    null: Null,
    procedure: Procedure,
    num_experts: int,
    alpha: float,
    precision: str,
    seed: int,
) -> None:
    logits_TE = noise(200, num_experts, seed) * (1 + seed % 4)
    if precision == "bfloat16":
        logits_TE = logits_TE.to(torch.bfloat16)
    elif precision == "rounded":
        logits_TE = logits_TE.round()
    table = table_for(null, num_experts, seed + 1)
    by_p_T = count_rejected(null.p_from_score(null.score(logits_TE), table), alpha, procedure)
    rank_E = ranks(num_experts, torch.device("cpu"))
    scores_TE = null.descending_scores(logits_TE)
    if procedure == "storey":
        lines = storey_cut_offs(null, alpha, num_experts, table)
        by_score_T1 = count_at_storey_cut_offs(scores_TE, lines, rank_E)
    else:
        cut_offs_E = cut_offs(null, alpha, num_experts, table, procedure)
        by_score_T1 = count_at_cut_offs(scores_TE, cut_offs_E, rank_E)
    assert torch.equal(by_score_T1.squeeze(-1), by_p_T)


@WITH_CUT_OFFS
@pytest.mark.parametrize("alpha", [0.01, 0.3])
def test_a_cut_off_is_the_smallest_score_on_its_line(null: Null, alpha: float) -> None:
    table = table_for(null, 8)
    cut_offs_E = cut_offs(null, alpha, 8, table)
    assert torch.equal(cut_offs_E, cut_offs_E.sort(descending=True).values)
    for k, cut_off in enumerate(cut_offs_E, start=1):
        if not bool(cut_off.isfinite()):
            continue
        below = torch.tensor(np.nextafter(cut_off.numpy(), np.float32(-np.inf)))
        on_line, off_line = null.p_from_score(torch.stack([cut_off, below]), table).tolist()
        assert on_line * (8 / k) <= alpha < off_line * (8 / k)


@WITH_CUT_OFFS
def test_scores_exactly_on_a_cut_off_count(null: Null) -> None:
    table = table_for(null, 8)
    cut_offs_E = cut_offs(null, 0.3, 8, table)
    rank_E = ranks(8, torch.device("cpu"))
    reachable = [k for k in range(1, 9) if bool(cut_offs_E[k - 1].isfinite())]
    assert reachable
    for k in reachable:
        scores_1E = torch.full((1, 8), -1e30)
        scores_1E[0, :k] = cut_offs_E[k - 1]
        assert int(count_at_cut_offs(scores_1E, cut_offs_E, rank_E)) == k
        assert int(count_rejected(null.p_from_score(scores_1E, table), 0.3)) == k


@EVERY_NULL
def test_scoring_makes_no_host_sync(null: Null) -> None:
    # A meta tensor has no values: whatever would read one raises.
    assert null.descending_scores(torch.empty(4, 64, device="meta")).shape == (4, 64)


@EVERY_NULL
def test_a_table_follows_the_device_of_the_scores(null: Null) -> None:
    table = table_for(null, 64)
    with OneDevice():
        assert null.p_from_score(null.score(torch.empty(4, 64, device="meta")), table).is_meta


@EVERY_NULL
def test_alpha_is_explained(null: Null) -> None:
    assert null.alpha_is in ("error rate", "tuning parameter", "nothing")
    if null.alpha_is != "error rate":
        assert null.alpha_is in null.meaning


@pytest.mark.parametrize("null", TABLED, ids=lambda null: null.name)
def test_a_null_without_its_table_says_what_to_run(null: Null) -> None:
    with pytest.raises(CalibrationError, match=rf"run: bh_routing\.calibrate.*{null.name}"):
        null.p_from_score(torch.zeros(3))


def test_the_shared_suite_would_notice_an_unstable_null() -> None:
    class Reversed(type(NULLS["pooled"])):  # type: ignore[misc]
        def score(self, router_logits_TE: Tensor, temperature: float = 1.0) -> Tensor:
            return -router_logits_TE.float()

    with pytest.raises(AssertionError):
        test_a_score_is_float32_and_never_falls_as_the_logit_rises(Reversed())
