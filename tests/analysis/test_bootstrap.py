"""The cluster bootstrap and its standard error against scipy and statsmodels."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import statsmodels.api as sm

from bh_routing.errors import InputError
from bh_routing.stats import bootstrap
from bh_routing.stats.bootstrap import cluster_bootstrap, cluster_standard_error, sum_clusters


def _documents(
    seed: int = 0, documents: int = 60, clusters: int = 25
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    cluster_D = rng.integers(0, clusters, documents)
    tokens_D = rng.integers(100, 600, documents).astype(float)
    effect_D = rng.normal(0.03, 0.02, clusters)[cluster_D] + rng.normal(0, 0.02, documents)
    return tokens_D * effect_D, tokens_D, cluster_D


def test_the_standard_error_equals_statsmodels_clustered_weighted_regression() -> None:
    values, weights, clusters = _documents()
    fit = sm.WLS(values / weights, np.ones(len(values)), weights=weights).fit(
        cov_type="cluster", cov_kwds={"groups": clusters}
    )
    ours = cluster_standard_error(sum_clusters(values, weights, clusters))
    assert ours[0] == pytest.approx(fit.bse[0], rel=1e-10)


def test_t_of_a_resample_is_that_of_its_documents_written_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, weights, clusters = _documents(seed=3, documents=30, clusters=12)
    names = np.unique(clusters)
    drawn_BG = np.random.default_rng(7).multinomial(
        len(names), np.full(len(names), 1 / len(names)), 5
    )
    monkeypatch.setattr(bootstrap, "draw_clusters", lambda *_: [drawn_BG.astype(float)])
    ours = cluster_bootstrap(values, weights, clusters)
    estimate = values.sum() / weights.sum()
    for b, drawn_G in enumerate(drawn_BG):
        copies = [np.flatnonzero(clusters == name) for name in np.repeat(names, drawn_G)]
        rows = np.concatenate(copies)
        again = np.concatenate([np.full(len(part), i) for i, part in enumerate(copies)])
        error = cluster_standard_error(sum_clusters(values[rows], weights[rows], again))[0]
        ratio = values[rows].sum() / weights[rows].sum()
        assert ours.t_BR[b, 0] == pytest.approx((ratio - estimate) / error, rel=1e-9)


def test_the_studentised_interval_reflects_the_tails_of_t() -> None:
    drawn = cluster_bootstrap(*_documents())
    high, low = drawn.estimate_R - np.quantile(drawn.t_BR, [0.025, 0.975], axis=0) * drawn.se_R
    assert [drawn.interval().low_R[0], drawn.interval().high_R[0]] == [low[0], high[0]]


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    documents = _documents()
    one, two = (cluster_bootstrap(*documents, seed=4).interval() for _ in range(2))
    other = cluster_bootstrap(*documents, seed=5).interval()
    assert one.low_R[0] == two.low_R[0] != other.low_R[0]


def test_chunks_of_resamples_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = _documents()
    whole = cluster_bootstrap(*documents, resamples=999, seed=8)
    monkeypatch.setattr(bootstrap, "_CHUNK_CELLS", 1000)
    pieces = cluster_bootstrap(*documents, resamples=999, seed=8)
    np.testing.assert_allclose(pieces.t_BR, whole.t_BR, rtol=1e-9)


def test_the_unit_of_tokens_does_not_matter() -> None:
    values, weights, clusters = _documents()
    one = cluster_bootstrap(values, weights, clusters).interval()
    thousand = cluster_bootstrap(values / 1000, weights / 1000, clusters).interval()
    assert thousand.high_R[0] == pytest.approx(one.high_R[0], rel=1e-9)


def test_columns_share_their_draws() -> None:
    values, weights, clusters = _documents()
    two = cluster_bootstrap(np.stack([values, 2 * values], axis=1), weights, clusters)
    np.testing.assert_allclose(two.t_BR[:, 1], two.t_BR[:, 0], rtol=1e-9)


def test_p_is_at_most_five_per_cent_exactly_where_the_ninety_per_cent_interval_ends_below() -> None:
    documents = _documents()
    drawn = cluster_bootstrap(*documents)
    upper = float(drawn.interval(0.90).high_R[0])
    step = 0.02 * float(drawn.se_R[0])
    assert drawn.p_below(upper + step)[0] < 0.05 < drawn.p_below(upper - step)[0]


def test_the_two_sided_p_meets_the_interval() -> None:
    documents = _documents()
    drawn = cluster_bootstrap(*documents)
    low, step = float(drawn.interval(0.95).low_R[0]), 0.02 * float(drawn.se_R[0])
    assert drawn.p_different(low - step)[0] < 0.05 < drawn.p_different(low + step)[0]


def test_no_spread_gives_nan_and_never_a_point_interval() -> None:
    weights = np.arange(1.0, 31.0)
    drawn = cluster_bootstrap(0.25 * weights, weights, np.arange(30))
    assert math.isnan(drawn.interval().low_R[0])
    assert math.isnan(drawn.p_different()[0])


def test_one_document_that_carries_everything_gives_nan() -> None:
    values = np.zeros(30)
    values[4] = 9.0
    drawn = cluster_bootstrap(values, np.ones(30), np.arange(30))
    assert math.isnan(drawn.interval().high_R[0])
    assert math.isnan(drawn.p_below(1.0)[0])


def test_a_document_of_weight_zero_changes_nothing() -> None:
    values, weights, clusters = _documents()
    more = cluster_bootstrap(
        np.append(values, 0.0), np.append(weights, 0.0), np.append(clusters, 999)
    )
    assert more.interval() == cluster_bootstrap(values, weights, clusters).interval()


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([1.0, 2.0], [1.0], "2, 1 and 2"),
        ([1.0, math.nan], [1.0, 1.0], "isn't finite"),
        ([1.0, 2.0], [1.0, -1.0], "at least 0, got -1"),
    ],
)
def test_documents_that_do_not_fit_are_refused(
    values: list[float], weights: list[float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sum_clusters(values, weights, [0, 1])


def test_ten_rules_over_42_documents_take_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(42, 10)), rng.uniform(100, 400, 42)
    bootstrap._small_draws.cache_clear()
    start = time.perf_counter()
    cluster_bootstrap(values, weights, np.arange(42), resamples=10_000).interval()
    assert time.perf_counter() - start < 1.0
