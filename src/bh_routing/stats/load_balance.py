"""Load balance: evenness of expert use in each layer, compared with sampling noise.

The noise is that of a uniform router: every set of as many experts as the rule kept is equally
likely.

Axes: S simulations, L layers, E experts, C experts kept per token (from 0).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bh_routing.errors import InputError

Floats = NDArray[np.float64]

MEASURES: Final = {
    "cv": "Coefficient of variation of the loads: standard deviation (denominator E) over mean.",
    "max_min_ratio": "Largest load over smallest; NaN if an expert is unused.",
    "max_violation": "MaxVio: largest load over the mean, minus 1.",
    "max_violation_share": "MaxVio over its ceiling E / mean experts kept - 1, which is reached "
    "when one expert is in every token's set: 0 to 1.",
    "entropy_share": "Entropy of the fractions of assignments over log E: 1 is even.",
    "gini": "Gini coefficient of the loads: 0 is even.",
    "dead_share": "Fraction of experts without any assignment.",
}
SIMULATIONS: Final = 200
EXACT_KEYS: Final = 10_000_000
"""Random keys, S * L * tokens * E, up to which every token's set is drawn: about half a second."""


def measure_load(
    expert_load: ArrayLike,
    count_histogram: ArrayLike,
    *,
    simulations: int = SIMULATIONS,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure load balance per layer and pooled, each with its sampling noise.

    The uniform router keeps as many experts per token as the rule did, with equal probability for
    each set. A load then has variance sum_t c_t/E (1 - c_t/E), and an expert stays unused with
    probability prod_t (1 - c_t/E): both exact. The other measures are simulated; max_min_ratio
    over the simulations that leave no expert unused, NaN if they are fewer than half.

    Args:
        expert_load: [layer][expert], tokens that kept this expert.
        count_histogram: [layer][c], tokens that kept c experts, c from 0.
        simulations: S.
        seed: seed of the simulation.
    Returns:
        num_tokens, mean_experts, measures (name in MEASURES -> dict) and note, the reason why a
        measure is NaN. The dict of a measure holds by_layer, mean (over layers; NaN if a layer's
        value is), pooled (over the concatenated loads of all layers), and the values under a
        uniform router: noise_by_layer (in closed form for cv and dead_share, else simulated), its
        mean noise, noise_pooled, and noise_sd, the simulated standard deviation of mean.
    Raises:
        InputError: the two inputs contradict each other, or a layer has no assignment.
    Example:
        >>> load = measure_load([[4, 4, 0, 0]], [[0, 8]])
        >>> load["measures"]["cv"]["mean"], load["measures"]["dead_share"]["mean"]
        (1.0, 0.5)
    """
    counts_LE, histogram_LC = _checked(expert_load, count_histogram)
    num_tokens, num_experts = int(histogram_LC[0].sum()), counts_LE.shape[1]
    kept_C = np.arange(histogram_LC.shape[1])
    kept_L = histogram_LC @ kept_C / num_tokens
    simulated_SLE = simulate_uniform_router(histogram_LC, num_experts, simulations, seed)
    layers, pooled = measures_of(counts_LE, kept_L), measures_of(*_pool(counts_LE, kept_L))
    noise = measures_of(simulated_SLE, kept_L)
    noise_pooled = measures_of(*_pool(simulated_SLE, kept_L))
    closed = {
        "cv": uniform_cv(histogram_LC, num_experts),
        "dead_share": uniform_dead_fraction(histogram_LC, num_experts),
    }
    closed_pooled = {
        # Every layer has mean load 1, so the pooled variance is the mean of the layers' variances.
        "cv": float(np.sqrt((closed["cv"] ** 2).mean())),
        "dead_share": float(closed["dead_share"].mean()),
    }
    measures = {}
    for name, value_L in layers.items():
        noise_L = closed.get(name, _mean_known(noise[name]))
        measures[name] = {
            "by_layer": value_L.tolist(),
            "mean": float(value_L.mean()),
            "pooled": float(pooled[name]),
            "noise_by_layer": noise_L.tolist(),
            "noise": float(noise_L.mean()),
            "noise_pooled": closed_pooled.get(name, float(_mean_known(noise_pooled[name]))),
            "noise_sd": _sd_known(noise[name].mean(axis=-1)),
        }
    unused = int((counts_LE == 0).any(axis=1).sum())
    note = f"max_min_ratio is NaN: {unused} of {len(counts_LE)} layers have an unused expert."
    return {
        "num_tokens": num_tokens,
        "mean_experts": float(kept_L.mean()),
        "measures": measures,
        "note": note if unused else "",
    }


def load_columns(expert_load: NDArray[np.integer], count_histogram: ArrayLike) -> dict[str, Any]:
    """Return the load columns of an experiment's record: each measure averaged over layers.

    Loads aren't summed over layers: equal indices in two layers are different experts.

    Args:
        expert_load: [layer][expert], tokens that kept this expert.
        count_histogram: [layer][c], tokens that kept c experts, c from 0.
    """
    measures = measures_of(expert_load.astype(np.float64), 1.0)
    num_experts, unused_L, note = expert_load.shape[1], (expert_load == 0).sum(axis=1), ""
    if unused_L.any():
        note = (
            f"{int((unused_L > 0).sum())} of {len(unused_L)} layers left experts unused (up to "
            f"{int(unused_L.max())} of {num_experts}), so max/min has no finite value"
        )
    return {
        "expert_utilization_cv": float(measures["cv"].mean()),
        "expert_utilization_cv_noise": float(uniform_cv(count_histogram, num_experts).mean()),
        "expert_utilization_max_min_ratio": float(measures["max_min_ratio"].mean()),
        "expert_utilization_note": note,
    }


def measures_of(loads: Floats, mean_experts: Floats | float) -> dict[str, Floats]:
    """Compute every measure over the last axis of loads or counts.

    Args:
        loads: shape (..., E), in any unit; they are divided by their mean.
        mean_experts: mean experts kept per token, in the shape of the leading axes.
    Returns:
        Name -> values in the shape of the leading axes.
    """
    num_experts = loads.shape[-1]
    with np.errstate(invalid="ignore"):  # a layer without assignments is NaN
        load = loads / loads.mean(axis=-1, keepdims=True)
    largest, smallest = load.max(axis=-1), load.min(axis=-1)
    ceiling = num_experts / np.asarray(mean_experts) - 1
    share = load / num_experts
    ranks = np.arange(1, num_experts + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = np.where(share > 0, -share * np.log(share), 0.0)
        return {
            "cv": load.std(axis=-1),
            "max_min_ratio": np.where(smallest > 0, largest / smallest, np.nan),
            "max_violation": largest - 1,
            # A rule that keeps every expert can't be uneven: its ceiling is 0.
            "max_violation_share": np.where(ceiling > 1e-12, (largest - 1) / ceiling, np.nan),
            "entropy_share": surprise.sum(axis=-1) / (math.log(num_experts) or math.nan),
            "gini": 2 * (np.sort(load, axis=-1) @ ranks) / num_experts**2
            - (num_experts + 1) / num_experts,
            "dead_share": (load == 0).mean(axis=-1),
        }


def _pool(loads: Floats, kept_L: Floats) -> tuple[Floats, float]:
    """Concatenate the loads of all layers; the pooled ceiling is that of the mean experts kept."""
    even = loads / loads.mean(axis=-1, keepdims=True)
    num_layers = loads.shape[-2]
    return even.reshape(*loads.shape[:-2], -1), float(kept_L.mean()) * num_layers


def _mean_known(values_S: Floats) -> Floats:
    """Return the mean of the finite values over simulations; NaN if fewer than half are finite."""
    known_S = np.isfinite(values_S)
    enough = known_S.mean(axis=0) >= 0.5
    total = np.where(known_S, values_S, 0.0).sum(axis=0)
    return np.asarray(np.where(enough, total / np.maximum(known_S.sum(axis=0), 1), np.nan))


def _sd_known(values_S: Floats) -> float:
    known_S = values_S[np.isfinite(values_S)]
    return float(known_S.std(ddof=1)) if len(known_S) >= max(2, len(values_S) / 2) else math.nan


def _checked(expert_load: ArrayLike, count_histogram: ArrayLike) -> tuple[Floats, Floats]:
    counts_LE = np.asarray(expert_load, dtype=np.float64)
    histogram_LC = np.asarray(count_histogram, dtype=np.float64)
    if counts_LE.ndim != 2 or histogram_LC.ndim != 2 or len(counts_LE) != len(histogram_LC):
        raise InputError(
            f"load needs counts [layer][expert] and a histogram [layer][kept] of the same layers, "
            f"got shapes {counts_LE.shape} and {histogram_LC.shape}"
        )
    assigned_L = histogram_LC @ np.arange(histogram_LC.shape[1])
    tokens_L = histogram_LC.sum(axis=1)
    if (tokens_L != tokens_L[0]).any() or (assigned_L != counts_LE.sum(axis=1)).any():
        raise InputError("counts and histogram must cover the same tokens, but their sums differ")
    if (assigned_L == 0).any():
        raise InputError("a layer has no assignment at all; there is no load to measure")
    return counts_LE, histogram_LC


def uniform_cv(count_histogram: ArrayLike, num_experts: int) -> Floats:
    """Return the root of the expected squared CV of each layer's loads, exactly.

    A token that keeps c of E adds a Bernoulli(c/E) to each load; tokens are independent.

    Example:
        >>> uniform_cv([[0, 0, 8]], num_experts=4).round(4).tolist()
        [0.3536]
    """
    histogram_LC = np.asarray(count_histogram, dtype=np.float64)
    fraction_C = np.arange(histogram_LC.shape[1]) / num_experts
    variance_L = histogram_LC @ (fraction_C * (1 - fraction_C))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sqrt(variance_L) / (histogram_LC @ fraction_C))


def uniform_dead_fraction(count_histogram: ArrayLike, num_experts: int) -> Floats:
    """Return the expected fraction of each layer's experts that no token keeps, exactly.

    Example:
        >>> uniform_dead_fraction([[0, 2]], num_experts=4).tolist()
        [0.5625]
    """
    histogram_LC = np.asarray(count_histogram, dtype=np.float64)
    free_C = 1 - np.arange(histogram_LC.shape[1]) / num_experts
    return np.asarray(np.prod(free_C**histogram_LC, axis=1))


def simulate_uniform_router(
    count_histogram: ArrayLike, num_experts: int, simulations: int, seed: int
) -> Floats:
    """Simulate the load of every expert in every layer.

    With few tokens every token's set is drawn. With many (EXACT_KEYS) each load is drawn from its
    exact marginal, a sum of binomials, and the loads of a layer are then shifted to their exact sum
    and scaled to their exact variance; ranges of loads are accurate to about 1 % from 50
    assignments per expert.

    Args:
        count_histogram: [layer][c], tokens that kept c experts.
        num_experts: E.
        simulations: S.
        seed: seed of the draws.
    Returns:
        Loads in assignments, shape (S, L, E), at least 0.
    """
    histogram_LC = np.asarray(count_histogram, dtype=np.int64)
    rng = np.random.default_rng(seed)
    if simulations * num_experts * int(histogram_LC.sum()) <= EXACT_KEYS:
        layers = [_draw_sets(rng, row_C, num_experts, simulations) for row_C in histogram_LC]
        return np.stack(layers, axis=1).astype(np.float64)
    return _draw_marginals(rng, histogram_LC, num_experts, simulations)


def _draw_sets(
    rng: np.random.Generator, histogram_C: NDArray[np.int64], num_experts: int, simulations: int
) -> NDArray[np.int64]:
    """Return the load of each expert in every simulation of one layer, (S, E)."""
    counts_E = np.zeros(simulations * num_experts, dtype=np.int64)
    first_S = num_experts * np.arange(simulations)
    for kept in range(1, len(histogram_C)):
        keys_STE = rng.random((simulations, int(histogram_C[kept]), num_experts))
        chosen_STK = np.argpartition(keys_STE, kept - 1, axis=-1)[..., :kept]
        chosen = (chosen_STK + first_S[:, None, None]).ravel()
        counts_E += np.bincount(chosen, minlength=len(counts_E))
    return counts_E.reshape(simulations, num_experts)


def _draw_marginals(
    rng: np.random.Generator, histogram_LC: NDArray[np.int64], num_experts: int, simulations: int
) -> Floats:
    shape = (simulations, len(histogram_LC), num_experts)
    counts_SLE = np.zeros(shape)
    for kept in range(1, histogram_LC.shape[1]):
        tokens_L1 = histogram_LC[:, kept, None]
        if tokens_L1.any():
            counts_SLE += rng.binomial(tokens_L1, kept / num_experts, size=shape)
    expected_L1 = (histogram_LC @ np.arange(histogram_LC.shape[1]) / num_experts)[:, None]
    away_SLE = counts_SLE - counts_SLE.mean(axis=-1, keepdims=True)
    # Independent draws lose 1/E of their variance when centred; true loads keep all of it.
    loads_SLE = expected_L1 + away_SLE * math.sqrt(num_experts / max(1, num_experts - 1))
    return np.where(counts_SLE == 0, 0.0, np.maximum(loads_SLE, 0.0))
