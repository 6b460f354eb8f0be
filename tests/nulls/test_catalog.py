"""Finding nulls by name, and p-values straight from logits."""

from __future__ import annotations

import pytest
import torch

from bh_routing.errors import InputError
from bh_routing.nulls import NULLS, ReferenceTable, get_null, p_values


def test_a_wrong_name_is_answered_with_the_list_and_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"unknown null 'backgroud'; known: .*pooled.*'background'"
    ):
        get_null("backgroud")


@pytest.mark.parametrize("name", NULLS)
def test_p_values_keep_the_shape_of_the_logits(name: str) -> None:
    logits = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    table = ReferenceTable.from_scores(torch.linspace(-2, 2, 100))
    assert p_values(logits, null=name, table=table).shape == logits.shape


def test_the_temperature_cancels_in_the_gaussian_null() -> None:
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(p_values(logits, "gaussian", temperature=2.0), p_values(logits, "gaussian"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused_with_their_number(bad: float) -> None:
    with pytest.raises(InputError, match="got 1 NaN or infinite of 3 values"):
        p_values(torch.tensor([1.0, bad, 0.0]), "gaussian")


@pytest.mark.parametrize("logits", [torch.tensor([1, 2]), torch.tensor(1.0), torch.empty(2, 0)])
def test_logits_without_experts_or_of_integers_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(InputError, match="router_logits"):
        p_values(logits, "gaussian")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf"), True])
def test_a_temperature_that_is_not_above_0_is_refused(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature must be a finite number above 0"):
        p_values(torch.zeros(3), "gaussian", temperature=temperature)
