"""Step-up procedures against scipy and statsmodels, and at their edges."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from bh_routing.errors import InputError
from bh_routing.multitest import benjamini_hochberg, benjamini_yekutieli, count_rejected, storey

ROWS_PER_SIZE = 12_500
SIZES = (1, 2, 3, 7, 8, 17, 60, 64)  # times ROWS_PER_SIZE: 100,000 rows
ALPHAS = (0.01, 0.05, 0.10, 0.5)


def random_rows(num_hypotheses: int, alpha: float, seed: int) -> np.ndarray:
    """Rows with signals, ties, zeros, ones and values exactly on or one ulp off BH's lines."""
    random = np.random.default_rng(seed)
    shape = (ROWS_PER_SIZE, num_hypotheses)
    p = random.random(shape) ** random.integers(1, 6, size=(ROWS_PER_SIZE, 1))
    rank = random.integers(1, num_hypotheses + 1, size=shape)
    on_line = rank * alpha / num_hypotheses
    for share, values in (
        (0.2, on_line),
        (0.05, np.nextafter(on_line, 1)),
        (0.05, np.nextafter(on_line, 0)),
        (0.03, np.zeros(shape)),
        (0.03, np.ones(shape)),
    ):
        p = np.where(random.random(shape) < share, values, p)
    is_coarse = random.random((ROWS_PER_SIZE, 1)) < 0.3
    return np.where(is_coarse, np.round(p, 2), p)


@pytest.mark.parametrize("num_hypotheses", SIZES)
@pytest.mark.parametrize("procedure", ["bh", "by"])
def test_the_mask_equals_scipys_adjusted_p_values_up_to_alpha(
    num_hypotheses: int, procedure: Literal["bh", "by"]
) -> None:
    reject = {"bh": benjamini_hochberg, "by": benjamini_yekutieli}[procedure]
    for seed, alpha in enumerate(ALPHAS):
        p = random_rows(num_hypotheses, alpha, seed)
        expected = false_discovery_control(p, axis=-1, method=procedure) <= alpha
        assert np.array_equal(reject(torch.from_numpy(p), alpha).numpy(), expected)


@pytest.mark.parametrize("procedure", ["bh", "by"])
def test_statsmodels_rejects_the_same_hypotheses(procedure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50, 64, generator=generator, dtype=torch.float64) ** 4
    ours = benjamini_hochberg(p, 0.05) if procedure == "bh" else benjamini_yekutieli(p, 0.05)
    for row, mask in zip(p.numpy(), ours.numpy(), strict=True):
        expected = multipletests(row, alpha=0.05, method=f"fdr_{procedure}")[0]
        assert np.array_equal(mask, expected)


def test_a_p_value_exactly_on_the_line_is_rejected() -> None:
    assert benjamini_hochberg(torch.tensor([0.05], dtype=torch.float64), 0.05).all()


def test_a_p_value_one_step_above_the_line_is_not_rejected() -> None:
    above = np.nextafter(0.05, 1)
    assert not benjamini_hochberg(torch.tensor([above], dtype=torch.float64), 0.05).any()


def test_a_late_rank_on_the_line_carries_all_smaller_p_values_with_it() -> None:
    p = torch.tensor([0.049, 0.05, 0.048, 0.047], dtype=torch.float64)
    assert benjamini_hochberg(p, 0.05).all()


def test_ties_with_the_last_rejected_are_rejected_together() -> None:
    p = torch.tensor([0.03, 0.9, 0.03, 0.03], dtype=torch.float64)
    assert benjamini_hochberg(p, 0.05).tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_is_compared_as_float64(dtype: torch.dtype) -> None:
    p = (torch.rand(200, 16, generator=torch.Generator().manual_seed(1)) ** 3).to(dtype)
    assert torch.equal(benjamini_hochberg(p, 0.1), benjamini_hochberg(p.double(), 0.1))


def test_leading_axes_are_independent_rows() -> None:
    p = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(2)) ** 3
    whole = benjamini_hochberg(p, 0.1)
    assert whole.shape == p.shape
    assert torch.equal(whole[1, 2, 4], benjamini_hochberg(p[1, 2, 4], 0.1))


def test_the_count_is_the_number_of_rejected_hypotheses() -> None:
    p = torch.from_numpy(random_rows(17, 0.05, seed=9))
    assert torch.equal(count_rejected(p, 0.05), benjamini_hochberg(p, 0.05).sum(dim=-1))


def test_no_rows_give_no_rows() -> None:
    assert benjamini_hochberg(torch.empty(0, 8), 0.05).shape == (0, 8)
    assert count_rejected(torch.empty(0, 8), 0.05).shape == (0,)


def test_a_larger_alpha_rejects_no_fewer() -> None:
    p = torch.from_numpy(random_rows(64, 0.05, seed=3))
    counts = [count_rejected(p, alpha) for alpha in (0.01, 0.05, 0.1, 0.5)]
    assert all(bool((a <= b).all()) for a, b in itertools.pairwise(counts))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf"), True, "0.05"])
def test_an_alpha_outside_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match=r"alpha must be .*\(0, 1\), got"):
        benjamini_hochberg(torch.tensor([0.5]), alpha)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (torch.tensor([0.1, float("nan")]), r"got 1 NaN of 2 values"),
        (torch.tensor([0.1, -0.001]), r"in \[0, 1\], got -0.001"),
        (torch.tensor([1.5, 2.0]), r"got 1.5 and 1 more outside"),
        (torch.tensor([float("inf")]), r"got inf"),
        (torch.tensor([0, 1]), r"floating-point tensor, got torch.int64"),
        (torch.tensor(0.5), r"at least one hypothesis"),
        (torch.empty(3, 0), r"got shape \(3, 0\)"),
    ],
)
def test_what_is_no_p_value_is_refused_with_the_reason(p: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        count_rejected(p, 0.05)


@pytest.mark.parametrize("reject", [benjamini_hochberg, benjamini_yekutieli, storey])
def test_dim_is_the_axis_of_the_hypotheses(reject: Callable[..., Tensor]) -> None:
    p = torch.rand(6, 5, 16, generator=torch.Generator().manual_seed(0)) ** 3
    along_last = reject(p)
    assert 0 < int(along_last.sum()) < p.numel()
    assert torch.equal(reject(p_values=p, alpha=0.05, dim=2), along_last)
    for dim in (0, 1, -2):
        assert torch.equal(reject(p.movedim(-1, dim), dim=dim), along_last.movedim(-1, dim))


@pytest.mark.parametrize(("dim", "got"), [(2, "2"), (-3, "-3"), (0.5, "0.5"), (None, "None")])
def test_an_axis_that_is_not_there_is_rejected(dim: Any, got: str) -> None:
    with pytest.raises(InputError, match=rf"from -2 to 1 for .* shape \(3, 4\), got {got}"):
        benjamini_hochberg(torch.full((3, 4), 0.5), dim=dim)
