"""Compare the loss of a rule with a reference at the same mean cost: experts per token or per step.

The reference is a curve of loss against cost, linear between neighbouring points. The difference is
taken at the rule's own measured mean, so a rule pays for what it keeps beyond its budget. It is a
smooth function of means and losses, ratios of sums over documents. Books are drawn with
replacement, every ratio is recomputed in each resample, and t is the shift of the difference
divided by its linearised cluster-robust standard error. Below 20 books, t is Student's.

Intervals are simultaneous over all tests of a family: the largest t of a resample replaces that of
a single test (single-step max-t; Bonferroni where t is Student's). They remain valid for a test
selected after looking at the data. p is two-sided and corrected by Holm.

Coverage of the 95 % intervals of the difference, and fraction of sweeps in which all four cover,
in 400 simulated sweeps per row, 42 books, 4 rules (test_sweep_coverage.py, marked `full`):

    effects by book   one interval   all four
    normal            0.948          0.955
    exponential       0.926          0.908

With a long tail of badly harmed books, the intervals are slightly too narrow. Draws of step
companions add their variance, as in `stats.clustered`.

Axes: D documents, G clusters, B resamples, K points of the curve, N tests, J ratios: losses of the
rule and the curve's K points, then their means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy import stats

from bh_routing.analysis.sweep_records import ScoredText, align
from bh_routing.results.records import QualityRecord, column, measured
from bh_routing.stats.bootstrap import (
    SPREAD_FLOOR,
    ClusterSums,
    Ends,
    Floats,
    draw_clusters,
    sum_clusters,
)
from bh_routing.stats.clustered import BOOTSTRAP_CLUSTERS, MIN_CLUSTERS
from bh_routing.stats.paired import holm

_CLOSEST: Final = 0.25
"""The later of two points of a curve closer than this is dropped: their slope would be noise."""
_ROUNDING: Final = 1e-9
SIGNIFICANCE_LEVEL: Final = 0.05
CONFIDENCE: Final = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Configurations whose losses, interpolated linearly, form a reference."""

    name: str
    config_names: tuple[str, ...]
    widest: float = math.inf
    """Longest segment, in experts. Losses are convex in experts: longer ones favour the rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualCost:
    """A rule compared with a reference at equal cost, as in a row of `comparisons.csv`.

    NaN is unknown, and `note` gives the reason. Intervals and p of the whole text hold jointly over
    all tests of the table, those of one domain for the row alone.
    """

    at_mean: float = measured(
        "Loss of the reference at the rule's own mean, on the line between its neighbouring "
        "points, in nats per token."
    )
    geometric: float = measured(
        "The same on the line of log losses: lower, so a harder bar, where the curve is convex."
    )
    difference: float = measured("The rule's loss minus at_mean.")
    low: float = measured("Lower end of its 95 % interval.")
    high: float = measured("Upper end of that interval.")
    p: float = measured("Two-sided p of no difference, uncorrected.")
    p_corrected: float = measured("p after Holm's correction over all tests.")
    saved: float = measured("1 - the rule's increase in perplexity divided by the reference's.")
    saved_low: float = measured("Lower end of its 95 % interval.")
    saved_high: float = measured("Upper end of that interval.")
    note: str = column("The missing values and the reason.", default="")

    @property
    def is_kept_in_logs(self) -> bool:
        """Whether the loss is clearly lower also if the reference is interpolated in log loss."""
        return self.high + self.at_mean - self.geometric < 0 and (
            self.p_corrected < SIGNIFICANCE_LEVEL
        )

    @property
    def answer(self) -> str:
        """Whether the rule has a lower loss than the curve: yes, no, undecided or unknown.

        Example:
            >>> EqualCost(difference=-0.02, low=-0.03, high=-0.01, p_corrected=0.004).answer
            'yes'
        """
        if not math.isfinite(self.difference + self.low + self.high + self.p_corrected):
            return "unknown"
        if self.p_corrected >= SIGNIFICANCE_LEVEL or self.low <= 0 <= self.high:
            return "undecided"
        return "yes" if self.high < 0 else "no"


Sampled = tuple[float, float, Floats | None]
"""Estimate, standard error and resampled t of a function of ratios; without t, Student's."""
Value = tuple[Floats, Floats]
"""Value of a function of ratios, (B,), and its derivatives, (B, J)."""


def compare_at_equal_cost(
    text: ScoredText,
    config_names: Sequence[str],
    curves: Sequence[Curve],
    *,
    resamples: int,
    seed: int,
    simultaneous: bool = True,
) -> dict[tuple[str, str], EqualCost]:
    """Compare configurations with curves at equal mean experts, as one family of tests.

    Args:
        text: the scored documents.
        config_names: configurations to compare; none is compared with a curve that contains it.
        curves: the references.
        resamples: bootstrap resamples, at least 100 per test, so that Holm's p can be small.
        seed: seed of the bootstrap.
        simultaneous: the intervals hold jointly; False: each for itself.
    Returns:
        (configuration, curve's name) -> comparison.
    """
    tests = {
        (name, curve.name): _find_knots(text, name, curve)
        for curve in curves
        for name in config_names
        if name not in curve.config_names
    }
    asked = {key: (key[0], *knots) for key, (knots, _) in tests.items() if knots}
    num_clusters = len(np.unique(text.clusters_D))
    draws = max(resamples, 100 * len(asked)), seed
    differences = [_sample(text, names, _difference, *draws) for names in asked.values()]
    shares = [_sample(text, names, _fraction_saved, *draws) for names in asked.values()]
    ends = _intervals(differences, num_clusters, simultaneous)
    fraction_ends = _intervals(shares, num_clusters, simultaneous)
    p_N = np.array([_p_different(sampled, num_clusters) for sampled in differences])
    corrected_N = holm(p_N)
    found = {key: EqualCost(note=note) for key, (_, note) in tests.items()}
    for i, (key, names) in enumerate(asked.items()):
        own = differences[i][0]
        ratios_1J = _columns(text, names).sum(axis=0, keepdims=True) / text.tokens_D.sum()
        found[key] = EqualCost(
            at_mean=float(ratios_1J[0, 0]) - own,
            geometric=_geometric(ratios_1J),
            difference=own,
            low=float(ends.low_R[i]),
            high=float(ends.high_R[i]),
            p=float(p_N[i]),
            p_corrected=float(corrected_N[i]),
            saved=shares[i][0],
            saved_low=float(fraction_ends.low_R[i]),
            saved_high=float(fraction_ends.high_R[i]),
            note=_why_no_interval(ends.low_R[i], fraction_ends.low_R[i], num_clusters),
        )
    return found


def compare_with_static(
    records: Sequence[QualityRecord], static: Sequence[str], *, resamples: int, seed: int
) -> dict[str, EqualCost]:
    """Compare every other configuration with static top-k at the configuration's own mean.

    Args:
        records: one per configuration and document.
        static: names of the static top-k configurations.
        resamples: as for `compare_at_equal_cost`.
        seed: seed of the bootstrap.
    Returns:
        Name -> comparison; empty without a static configuration.
    """
    names = dict.fromkeys(record.config_name for record in records)
    others = [name for name in names if name not in static]
    if not static or not others:
        return {}
    text, name = align(records), "static top-k"
    widest = math.inf if text.has_steps else 1.0
    curve = Curve(name=name, config_names=tuple(static), widest=widest)
    found = compare_at_equal_cost(text, others, [curve], resamples=resamples, seed=seed)
    return {other: found[other, name] for other in others}


def _find_knots(text: ScoredText, config_name: str, curve: Curve) -> tuple[tuple[str, ...], str]:
    """Return the part of the curve around the rule's mean, or the reason for none."""
    if config_name not in text.names:
        return (), "It wasn't scored on all documents: not compared."
    mean = _mean_cost(text, config_name)
    scored = [name for name in curve.config_names if name in text.names]
    knots = sorted((_mean_cost(text, name), name) for name in scored)
    stretches: list[list[tuple[float, str]]] = []
    for knot in knots:
        if not stretches or knot[0] - stretches[-1][-1][0] > curve.widest + _ROUNDING:
            stretches.append([knot])
        elif knot[0] - stretches[-1][-1][0] >= _CLOSEST:
            stretches[-1].append(knot)
    for stretch in stretches:
        inside = stretch[0][0] - _ROUNDING <= mean <= stretch[-1][0] + _ROUNDING
        if inside and len(stretch) > 1:
            return tuple(name for _, name in stretch), ""
    where = ", ".join(f"{knot:.2f}" for knot, _ in knots) or "nowhere"
    return (), (
        f"{mean:.2f} experts don't lie between two points of {curve.name} at most "
        f"{curve.widest:g} apart (they are at {where}), and nothing is extrapolated."
    )


def _mean_cost(text: ScoredText, name: str) -> float:
    return float(text.cost_DC[:, text.names.index(name)].sum() / text.tokens_D.sum())


def _columns(text: ScoredText, names: Sequence[str]) -> Floats:
    at = [text.names.index(name) for name in names]
    return np.hstack([text.losses_DC[:, at], text.cost_DC[:, at]])


def _line(ratios_BJ: Floats) -> Value:
    """Interpolate the curve's loss at each resample's mean."""
    num_knots = ratios_BJ.shape[1] // 2 - 1
    mean_B, knots_BK = ratios_BJ[:, num_knots + 1], ratios_BJ[:, num_knots + 2 :]
    rows_B = np.arange(len(ratios_BJ))
    # The estimate lies inside. For resamples beyond an end the last segment is extrapolated, else
    # the distribution would lack exactly those.
    left_B = np.clip((knots_BK <= mean_B[:, None]).sum(axis=1) - 1, 0, num_knots - 2)
    start_B = knots_BK[rows_B, left_B]
    width_B = knots_BK[rows_B, left_B + 1] - start_B
    first_B, second_B = ratios_BJ[rows_B, 1 + left_B], ratios_BJ[rows_B, 2 + left_B]
    fraction_B, slope_B = (mean_B - start_B) / width_B, (second_B - first_B) / width_B
    gradient_BJ = np.zeros_like(ratios_BJ)
    gradient_BJ[rows_B, 1 + left_B] = 1 - fraction_B
    gradient_BJ[rows_B, 2 + left_B] = fraction_B
    gradient_BJ[:, num_knots + 1] = slope_B
    gradient_BJ[rows_B, num_knots + 2 + left_B] = -slope_B * (1 - fraction_B)
    gradient_BJ[rows_B, num_knots + 3 + left_B] = -slope_B * fraction_B
    return first_B + fraction_B * (second_B - first_B), gradient_BJ


def _difference(ratios_BJ: Floats) -> Value:
    loss_B, gradient_BJ = _line(ratios_BJ)
    gradient_BJ[:, 0] -= 1
    return ratios_BJ[:, 0] - loss_B, -gradient_BJ


def _fraction_saved(ratios_BJ: Floats) -> Value:
    loss_B, slope_BJ = _line(ratios_BJ)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        own_B, curve_B = np.expm1(ratios_BJ[:, 0]), np.expm1(loss_B)
        # Without a loss of the curve there is nothing to save.
        curve_B = np.where(curve_B > 0, curve_B, np.nan)
        gradient_BJ = slope_BJ * (own_B * (curve_B + 1) / curve_B**2)[:, None]
        gradient_BJ[:, 0] -= (own_B + 1) / curve_B
        return 1 - own_B / curve_B, gradient_BJ


def _geometric(ratios_1J: Floats) -> float:
    num_knots = ratios_1J.shape[1] // 2 - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        logs_1K = np.log(ratios_1J[:, 1 : num_knots + 1])
    logged_1J = ratios_1J.copy()
    logged_1J[:, 1 : num_knots + 1] = logs_1K
    with np.errstate(invalid="ignore"):
        found = float(np.exp(_line(logged_1J)[0][0]))
    return found if found > 0 else math.nan


def _sample(
    text: ScoredText,
    names: Sequence[str],
    function: Callable[[Floats], Value],
    resamples: int,
    seed: int,
) -> Sampled:
    sums = sum_clusters(_columns(text, names), text.tokens_D, text.clusters_D)
    num_clusters = len(sums.weights_G)
    everything_1G = np.ones((1, num_clusters))
    value_1, error_1 = _evaluate(function, sums, everything_1G)
    estimate, se = float(value_1[0]), float(error_1[0])
    draws = sum_clusters(_columns(text, names), text.tokens_D, text.draws_D)
    if len(draws.weights_G) > 1:
        se = math.hypot(se, _evaluate(function, draws, np.ones((1, len(draws.weights_G))))[1][0])
    if num_clusters < BOOTSTRAP_CLUSTERS or not se > 0:
        return estimate, se if se > 0 else math.nan, None
    parts = []
    for drawn_BG in draw_clusters(num_clusters, resamples, seed):
        value_B, error_B = _evaluate(function, sums, drawn_BG)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append((value_B - estimate) / error_B)
    return estimate, se, np.concatenate(parts)


def _evaluate(
    function: Callable[[Floats], Value], sums: ClusterSums, drawn_BG: Floats
) -> tuple[Floats, Floats]:
    """Evaluate a function and its linearised cluster-robust standard error in each resample."""
    num_clusters = len(sums.weights_G)
    total_B = drawn_BG @ sums.weights_G
    ratios_BJ = (drawn_BG @ sums.values_GR) / total_B[:, None]
    value_B, gradient_BJ = function(ratios_BJ)
    at_mean_B = (gradient_BJ * ratios_BJ).sum(axis=1)
    influence_BG = gradient_BJ @ sums.values_GR.T - at_mean_B[:, None] * sums.weights_G
    scale = num_clusters / max(1, num_clusters - 1)
    error_B = np.sqrt(scale * (drawn_BG * influence_BG**2).sum(axis=1)) / total_B
    size_B = np.abs(gradient_BJ * ratios_BJ).sum(axis=1)
    return value_B, np.where(error_B <= SPREAD_FLOOR * size_B, 0.0, error_B)


def _intervals(sampled: Sequence[Sampled], num_clusters: int, simultaneous: bool) -> Ends:
    estimate_N, se_N = (np.array([one[field] for one in sampled]) for field in (0, 1))
    known_N = np.isfinite(se_N)
    t_2N = np.full((2, len(sampled)), math.nan)
    tail = (1 - CONFIDENCE) / 2
    resampled = [t_B for *_, t_B in sampled if t_B is not None]
    if resampled:
        t_BN = np.stack(resampled, axis=1)
        # Resamples with an unknown value count against both ends.
        least_BN = np.where(np.isnan(t_BN), -np.inf, t_BN)
        most_BN = np.where(np.isnan(t_BN), np.inf, t_BN)
        # Between two unknown resamples the end is unknown too: infinity - infinity is NaN.
        with np.errstate(invalid="ignore"):
            t_2K = _quantiles(least_BN, most_BN, tail)
            # A test without an interval of its own would leave the others without one.
            is_known_K = np.isfinite(t_2K).all(axis=0)
            if simultaneous and is_known_K.any():
                least_BN = least_BN[:, is_known_K].min(axis=1, keepdims=True)
                most_BN = most_BN[:, is_known_K].max(axis=1, keepdims=True)
                t_2K[:, is_known_K] = _quantiles(least_BN, most_BN, tail)
        t_2N[:, known_N] = t_2K
    elif num_clusters >= MIN_CLUSTERS:
        shared = max(1, int(known_N.sum())) if simultaneous else 1
        t = float(stats.t.isf(tail / shared, num_clusters - 1))
        t_2N[:, known_N] = np.array([[-t], [t]])
    high_N, low_N = estimate_N - t_2N * se_N
    is_known_N = np.isfinite(low_N + high_N)
    return Ends(np.where(is_known_N, low_N, math.nan), np.where(is_known_N, high_N, math.nan))


def _quantiles(least_BN: Floats, most_BN: Floats, tail: float) -> Floats:
    """Return both critical values of t, shape (2, N)."""
    return np.stack([np.quantile(least_BN, tail, axis=0), np.quantile(most_BN, 1 - tail, axis=0)])


def _p_different(sampled: Sampled, num_clusters: int) -> float:
    estimate, se, t_B = sampled
    if not se > 0 or num_clusters < MIN_CLUSTERS:
        return math.nan
    t = estimate / se
    if t_B is None:
        return float(2 * stats.t.sf(abs(t), num_clusters - 1))
    below, above = (1 + (t_B <= t).sum()), (1 + (t_B >= t).sum())
    return float(min(1.0, 2 * min(below, above) / (len(t_B) + 1)))


def _why_no_interval(low: float, fraction_low: float, num_clusters: int) -> str:
    if math.isnan(low):
        if num_clusters < MIN_CLUSTERS:
            return f"{num_clusters} clusters: no interval and no test, they need {MIN_CLUSTERS}."
        return "(Almost) every document shows the same difference: no spread, no interval."
    if math.isnan(fraction_low):
        return "The reference loses nothing, or almost nothing, here: no part of it can be saved."
    return ""
