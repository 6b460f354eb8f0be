"""Load measures against scipy and brute force; their noise against a simulated uniform router."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bh_routing.errors import InputError
from bh_routing.stats import load_balance
from bh_routing.stats.load_balance import (
    MEASURES,
    measure_load,
    measures_of,
    simulate_uniform_router,
    uniform_cv,
    uniform_dead_fraction,
)

EXPERTS = 16


def uniform_counts(kept_T: np.ndarray, simulations: int, seed: int = 0) -> np.ndarray:
    """Counts of a router that keeps any set of the wished size with the same chance, (S, E)."""
    rng = np.random.default_rng(seed)
    order_STE = rng.random((simulations, len(kept_T), EXPERTS)).argsort(-1).argsort(-1)
    return np.asarray((order_STE < kept_T[:, None]).sum(axis=1))


def histogram_of(kept_T: np.ndarray) -> list[list[int]]:
    return [np.bincount(kept_T).tolist()]


@pytest.fixture(scope="module")
def counts_E() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 60, EXPERTS).astype(float)


def test_cv_and_entropy_equal_scipys(counts_E: np.ndarray) -> None:
    ours = measures_of(counts_E, 2.0)
    assert ours["cv"] == pytest.approx(stats.variation(counts_E), rel=1e-12)
    assert ours["entropy_share"] == pytest.approx(stats.entropy(counts_E, base=EXPERTS), rel=1e-12)


def test_gini_is_half_the_mean_gap_between_two_experts(counts_E: np.ndarray) -> None:
    gaps = np.abs(counts_E[:, None] - counts_E[None, :]).mean()
    assert measures_of(counts_E, 2.0)["gini"] == pytest.approx(gaps / (2 * counts_E.mean()))


def test_no_measure_changes_when_every_token_comes_twice(counts_E: np.ndarray) -> None:
    one, two = measures_of(counts_E, 2.0), measures_of(2 * counts_E, 2.0)
    for name in MEASURES:
        assert two[name] == pytest.approx(one[name], rel=1e-12)


@pytest.mark.parametrize("kept", [1, 2, 8])
def test_max_violation_reaches_its_ceiling_where_an_expert_is_in_every_set(kept: int) -> None:
    tokens = 300
    counts = np.full(EXPERTS, tokens * (kept - 1) / (EXPERTS - 1))
    counts[3] = tokens
    assert measures_of(counts, float(kept))["max_violation_share"] == pytest.approx(1.0)


def test_an_even_load_scores_nothing_but_full_entropy() -> None:
    ours = {name: float(value) for name, value in measures_of(np.full(8, 5.0), 2.0).items()}
    assert ours == pytest.approx(
        dict.fromkeys(MEASURES, 0.0) | {"max_min_ratio": 1.0, "entropy_share": 1.0}, abs=1e-12
    )


def test_an_unused_expert_makes_the_ratio_nan_with_a_sentence() -> None:
    load = measure_load([[4, 4, 0], [3, 3, 2]], [[0, 8], [0, 8]])
    ratio = load["measures"]["max_min_ratio"]
    assert math.isnan(ratio["by_layer"][0])
    assert ratio["by_layer"][1] == 1.5
    assert math.isnan(ratio["mean"])
    assert "1 of 2 layers" in load["note"]
    assert load["measures"]["dead_share"]["mean"] == pytest.approx(1 / 6)


def test_pooling_keeps_layers_apart() -> None:
    # Each layer puts all on one of its two experts; summed by number they would look even.
    load = measure_load([[8, 0], [0, 8]], [[0, 8], [0, 8]])
    assert load["measures"]["cv"]["pooled"] == 1.0


@pytest.mark.parametrize(("tokens", "is_drawn_whole"), [(20, True), (20, False), (250, False)])
def test_the_noise_of_every_measure_is_that_of_a_uniform_router(
    monkeypatch: pytest.MonkeyPatch, tokens: int, is_drawn_whole: bool
) -> None:
    monkeypatch.setattr(load_balance, "EXACT_KEYS", 10**9 if is_drawn_whole else 0)
    kept_T = np.random.default_rng(1).integers(1, 7, tokens)
    counts_SE = uniform_counts(kept_T, simulations=2000)
    load = measure_load([counts_SE[0].tolist()], histogram_of(kept_T), simulations=2000, seed=2)
    expected = measures_of(counts_SE.astype(float), float(kept_T.mean()))
    for name, values_S in expected.items():
        if tokens == 20 and not is_drawn_whole and name == "max_min_ratio":
            continue  # its smallest load is then no whole number
        ours = load["measures"][name]
        known_S = values_S[np.isfinite(values_S)]  # max over min: where every expert was used
        # 2 %: 2,000 draws on either side; CV's closed form is a root mean square, hence squares.
        truth = math.sqrt((known_S**2).mean()) if name == "cv" else float(known_S.mean())
        assert ours["noise"] == pytest.approx(truth, rel=0.02, abs=2e-3), name
        assert ours["noise_sd"] == pytest.approx(float(known_S.std()), rel=0.12, abs=2e-3), name


def test_drawn_sets_give_every_token_as_many_experts_as_it_kept() -> None:
    loads = simulate_uniform_router([[1, 2, 3, 4]], num_experts=3, simulations=50, seed=0)
    assert (loads.sum(axis=-1) == 2 + 6 + 12).all()
    assert (loads >= 4).all()  # four tokens keep all three experts
    assert loads.std() > 0


def test_closed_forms_equal_a_long_simulation_with_few_tokens() -> None:
    kept_T = np.array([1, 1, 2, 3, 5])
    counts_SE = uniform_counts(kept_T, simulations=40_000)
    squares = (counts_SE.std(axis=1) / counts_SE.mean(axis=1)) ** 2
    assert uniform_cv(histogram_of(kept_T), EXPERTS)[0] ** 2 == pytest.approx(
        squares.mean(), rel=0.01
    )
    dead = uniform_dead_fraction(histogram_of(kept_T), EXPERTS)[0]
    assert dead == pytest.approx((counts_SE == 0).mean(), rel=0.01)


@pytest.mark.parametrize(
    ("counts", "histogram", "message"),
    [
        ([[4, 4]], [[0, 9]], "sums differ"),
        ([[4, 4], [1, 1]], [[0, 8], [0, 2]], "sums differ"),
        ([[0, 0]], [[8]], "no assignment"),
        ([4, 4], [[0, 8]], r"shapes \(2,\)"),
    ],
)
def test_counts_that_contradict_each_other_are_refused(
    counts: list[list[int]], histogram: list[list[int]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        measure_load(counts, histogram)
