"""Scores against a token's median: the Gaussian null and the two tabled ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation, norm

from bh_routing.errors import CalibrationError
from bh_routing.nulls import ReferenceTable, get_null

LOGITS_TE = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))


def test_the_median_of_an_even_number_is_the_mean_of_the_two_middle_values() -> None:
    scores = get_null("pooled").score(torch.tensor([[1.0, 2.0, 4.0, 10.0]]))
    assert scores.tolist() == [[-2.0, -1.0, 1.0, 7.0]]


def test_the_gaussian_score_is_the_robust_z_of_scipy() -> None:
    logits = LOGITS_TE.double().numpy()
    scale = 1.4826 * median_abs_deviation(logits, axis=-1)
    expected = (logits - np.median(logits, axis=-1, keepdims=True)) / scale[:, None]
    assert np.allclose(get_null("gaussian").score(LOGITS_TE).numpy(), expected, atol=1e-5)


def test_the_gaussian_p_value_is_scipys_upper_tail_far_out_too() -> None:
    z = torch.tensor([-3.0, 0.0, 1.645, 5.0, 30.0])
    p = get_null("gaussian").p_from_score(z).numpy()
    assert np.allclose(p, norm.sf(z.double().numpy()), rtol=1e-12, atol=0)


def test_the_gaussian_score_does_not_change_with_the_scale_of_the_logits() -> None:
    null = get_null("gaussian")
    assert torch.equal(null.score(LOGITS_TE), null.score(LOGITS_TE * 4))


def test_a_row_with_most_logits_tied_falls_back_to_the_mean_deviation() -> None:
    scores = get_null("gaussian").score(torch.tensor([[5.0, 4.0, 0, 0, 0, 0, 0, 0]]))
    scale = (9 / 8) * np.sqrt(np.pi / 2)
    assert np.allclose(scores[0, :2].numpy(), [5 / scale, 4 / scale])
    assert scores[0, 2:].tolist() == [0.0] * 6


def test_a_row_with_all_logits_tied_scores_zero_and_rejects_nothing() -> None:
    null = get_null("gaussian")
    scores = null.score(torch.full((1, 8), 3.25))
    assert scores.tolist() == [[0.0] * 8]
    assert null.p_from_score(scores).tolist() == [[0.5] * 8]


def test_a_table_p_value_counts_references_at_or_above_the_score_plus_one() -> None:
    table = ReferenceTable.from_scores(torch.tensor([3.0, 1.0, 2.0, 2.0]))
    p = table.p_values(torch.tensor([[4.0, 3.0], [2.0, 0.0]]))
    assert p.tolist() == [[1 / 5, 2 / 5], [4 / 5, 1.0]]


def test_the_background_is_what_the_top_k_left_out() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, 10.0]])
    scores = get_null("background").reference(logits, torch.tensor([[4, 1]]))
    assert sorted(scores.tolist()) == [-2.0, -1.0, 0.0]


def test_the_pool_holds_every_expert() -> None:
    scores = get_null("pooled").reference(LOGITS_TE, LOGITS_TE.topk(8).indices)
    assert scores.numel() == LOGITS_TE.numel()


def test_a_model_that_uses_all_experts_has_no_background() -> None:
    with pytest.raises(CalibrationError, match="uses all 64; choose null='gaussian'"):
        get_null("background").reference(LOGITS_TE, LOGITS_TE.topk(64).indices)


@pytest.mark.parametrize("scores", [torch.empty(0), torch.tensor([1.0, float("nan")])])
def test_a_table_of_no_or_not_finite_scores_is_refused(scores: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match="at least one score, all finite"):
        ReferenceTable.from_scores(scores)
