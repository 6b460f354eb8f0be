"""A served layer decides the decode rows of a pass as the reference implementation decides them.

By torch operations, and with TRITON_INTERPRET=1 by kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bh_routing.rules import (
    BenjaminiHochberg,
    BenjaminiHochbergDrop,
    ExpertBudget,
    FisherMass,
    OpportunisticActivation,
    TopK,
)
from bh_routing.rules.router import SoftmaxFamily, reference_router
from bh_routing.serving.layer import MOST_FUSED_ROWS, ServedLayer, StepRows
from tests.rules.proposals import MODEL_TOP_K, NUM_EXPERTS, context_for, random_logits

RULES: list[Any] = [
    OpportunisticActivation(2),
    FisherMass(0.4),
    ExpertBudget(20),
    BenjaminiHochbergDrop(0.3, scope="step"),
]
RULES += [dataclasses.replace(rule, refill=count) for rule in RULES for count in (12, 64)]
NUM_ROWS = 24
IS_DECODE = np.arange(20) % 2 == 0
"""Of 20 requests' rows; 4 rows of padding follow."""


def served(rule: Any, prefill_rule: Any, normalises: bool, most: int) -> tuple[Tensor, ...]:
    """Return router logits, the model's own weights and ids, and those of a served layer."""
    family = SoftmaxFamily(normalises=normalises, weights_dtype=torch.float32)
    logits_TE = random_logits(NUM_ROWS, seed=5)
    rows = StepRows(64, most, torch.device("cpu"))
    rows.set(IS_DECODE)
    prefill = None if prefill_rule is None else prefill_rule.bind(context_for(prefill_rule))
    record_TK = torch.zeros(64, MODEL_TOP_K, dtype=torch.int32)
    layer = ServedLayer(
        rule, context_for(rule), prefill, normalises=normalises, rows=rows, record_TK=record_TK
    )
    own = family.propose(logits_TE, MODEL_TOP_K)
    routed = layer.route(logits_TE)
    assert (routed is not None) == (
        layer.implementation == "fused kernels" and NUM_ROWS <= MOST_FUSED_ROWS
    )
    own_TK = own.top_k_weights_TK, own.top_k_index_TK
    weights_TK, index_TK = routed or layer.decide(logits_TE, *own_TK)
    assert torch.equal(record_TK[:NUM_ROWS], index_TK.int())
    index_TK = index_TK.long()
    return logits_TE, own.top_k_weights_TK, own.top_k_index_TK, weights_TK, index_TK


@pytest.mark.parametrize(
    "rule",
    [TopK(3), BenjaminiHochberg(0.3), BenjaminiHochbergDrop(0.3), *RULES],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
def test_one_rows_nan_changes_no_other_rows_decision(rule: Any) -> None:
    family = SoftmaxFamily(normalises=False, weights_dtype=torch.float32)
    logits_TE = random_logits(NUM_ROWS, seed=5)
    decisions = []
    # Without NaN, the row is a prompt's.
    for is_nan in (False, True):
        rows = StepRows(64, 64, torch.device("cpu"))
        rows.set(IS_DECODE & ((np.arange(20) != 4) | is_nan))
        layer = ServedLayer(
            rule, context_for(rule), None, normalises=False, rows=rows,
            record_TK=torch.zeros(64, MODEL_TOP_K, dtype=torch.int32),
        )  # fmt: skip
        logits_TE[4] = float("nan") if is_nan else 0.0
        own = family.propose(logits_TE, MODEL_TOP_K)
        own_TK = own.top_k_weights_TK, own.top_k_index_TK
        decisions.append(layer.route(logits_TE) or layer.decide(logits_TE, *own_TK))
    (weights_TK, index_TK), (nan_weights_TK, nan_index_TK) = decisions
    is_other_T = torch.arange(NUM_ROWS) != 4
    is_other_T[20:] = False
    assert torch.equal(nan_weights_TK[is_other_T], weights_TK[is_other_T])
    assert torch.equal(nan_index_TK[is_other_T], index_TK[is_other_T])
    assert 0 <= int(nan_index_TK.min()) <= int(nan_index_TK.max()) < NUM_EXPERTS


def by_expert(weights_TK: Tensor, index_TK: Tensor) -> Tensor:
    """Return the weights of all experts, (T, E)."""
    return torch.zeros(len(weights_TK), NUM_EXPERTS).scatter_add(-1, index_TK, weights_TK)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("normalises", [False, True])
@pytest.mark.parametrize("most", [10, 64])
def test_decode_rows_are_decided_as_a_step_of_their_own(
    rule: Any, normalises: bool, most: int
) -> None:
    logits_TE, own_TK, own_index_TK, weights_TK, index_TK = served(rule, None, normalises, most)
    assert index_TK.shape == (NUM_ROWS, MODEL_TOP_K)
    is_decode_T = torch.from_numpy(np.pad(IS_DECODE, (0, 4)))
    family = SoftmaxFamily(normalises=normalises, weights_dtype=torch.float32)
    slots = reference_router(rule, context_for(rule), family)(logits_TE[is_decode_T])
    wanted_TE = by_expert(slots.top_k_weights_TK, slots.top_k_index_TK)
    found_TE = by_expert(weights_TK, index_TK)
    assert torch.equal(found_TE[is_decode_T] > 0, wanted_TE > 0)
    # A kernel rounds otherwise.
    torch.testing.assert_close(found_TE[is_decode_T], wanted_TE, rtol=1e-5, atol=0)
    assert set(index_TK[is_decode_T].flatten().tolist()) == set(
        slots.top_k_index_TK.flatten().tolist()
    )
    in_prefill_T = ~is_decode_T
    in_prefill_T[20:] = False
    own_TE = by_expert(own_TK, own_index_TK)
    torch.testing.assert_close(found_TE[in_prefill_T], own_TE[in_prefill_T], rtol=1e-6, atol=0)
    assert not torch.equal(found_TE[is_decode_T], own_TE[is_decode_T])
    read_by_others = set(index_TK[:20].flatten().tolist())
    assert set(index_TK[20:][weights_TK[20:] == 0].tolist()) <= read_by_others


def test_refilled_slots_are_beyond_the_models_own() -> None:
    for rule in RULES:
        _, own_TK, own_index_TK, weights_TK, index_TK = served(rule, None, False, 64)
        is_other_TE = (by_expert(weights_TK, index_TK) > 0) & (by_expert(own_TK, own_index_TK) == 0)
        assert bool(is_other_TE[: len(IS_DECODE)].any()) == (rule.refill is not None)


@pytest.mark.parametrize("rule", RULES[:1] + RULES[-2:], ids=str)
@pytest.mark.parametrize("normalises", [False, True])
def test_prefill_rows_follow_the_prefill_rule(rule: Any, normalises: bool) -> None:
    for prefill_rule in (TopK(3), BenjaminiHochbergDrop(0.4)):
        logits_TE, *_, weights_TK, index_TK = served(rule, prefill_rule, normalises, 10)
        rows_T = torch.from_numpy(np.flatnonzero(~IS_DECODE))
        family = SoftmaxFamily(normalises=normalises, weights_dtype=torch.float32)
        router = reference_router(prefill_rule, context_for(prefill_rule), family)
        slots = router(logits_TE[rows_T])
        wanted_TE = by_expert(slots.top_k_weights_TK, slots.top_k_index_TK)
        found_TE = by_expert(weights_TK, index_TK)[rows_T]
        torch.testing.assert_close(found_TE, wanted_TE, rtol=1e-6, atol=0)
        assert (weights_TK[rows_T] == 0).any()
