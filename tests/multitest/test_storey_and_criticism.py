"""Storey's procedure and Higher Criticism against plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from bh_routing.multitest import benjamini_hochberg, storey
from bh_routing.multitest.step_up import higher_criticism


def storey_in_plain_python(p: list[float], alpha: float) -> list[bool]:
    num = len(p)
    null_fraction = (1 + sum(value > 0.5 for value in p)) / (num * 0.5)
    lines = [
        value
        for rank, value in enumerate(sorted(p), start=1)
        if value <= alpha * rank / (num * null_fraction) and value <= 0.5
    ]
    return [bool(lines) and value <= max(lines) for value in p]


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2, 0.6])
def test_storeys_procedure_equals_its_definition(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p_TE = torch.rand(300, 12, generator=generator, dtype=torch.float64)
    p_TE[:, :6] **= 4
    expected = [storey_in_plain_python(row, alpha) for row in p_TE.tolist()]
    assert storey(p_TE, alpha).tolist() == expected


def test_storeys_procedure_rejects_more_where_most_hypotheses_are_false() -> None:
    p_E = torch.tensor([0.001, 0.01, 0.02, 0.03, 0.06, 0.9])
    assert int(storey(p_E, 0.05).sum()) > int(benjamini_hochberg(p_E, 0.05).sum())


def test_nothing_above_lambda_is_rejected() -> None:
    assert storey(torch.tensor([0.1, 0.2, 0.3, 0.51]), 0.9).tolist() == [True, True, True, False]


def test_criticism_is_the_standardised_excess_of_small_p_values() -> None:
    p = [0.001, 0.04, 0.2, 0.21, 0.8]
    expected = [
        math.sqrt(5) * (i / 5 - value) / math.sqrt(value * (1 - value))
        for i, value in enumerate(p, start=1)
    ]
    assert higher_criticism(torch.tensor(p, dtype=torch.float64)).tolist() == pytest.approx(
        expected
    )


def test_p_values_of_0_and_1_give_finite_criticism() -> None:
    assert bool(higher_criticism(torch.tensor([0.0, 1.0])).isfinite().all())
