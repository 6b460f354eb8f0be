"""Do the intervals at equal cost hold the truth, jointly, as often as they say?

A data set: 42 books whose difficulty moves losses and, for the rules, experts. Rules lie between
whole k at known distances from the line, so the truth is known.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from bh_routing.analysis.sweep_equal_cost import Curve, compare_at_equal_cost
from bh_routing.analysis.sweep_records import ScoredText

KNOTS = {"four": (4.0, 0.25), "five": (5.0, 0.11), "six": (6.0, 0.05)}
RULES = {"a": (4.3, 0.16), "b": (4.8, 0.14), "c": (5.1, 0.08), "d": (5.6, 0.09)}
STATIC = Curve(name="top_k", config_names=tuple(KNOTS), widest=1.0)


def truth(rule: str) -> tuple[float, float]:
    """Difference and share saved."""
    mean, loss = RULES[rule]
    line = float(np.interp(mean, *np.array(list(KNOTS.values())).T))
    return loss - line, 1 - math.expm1(loss) / math.expm1(line)


def draw(rng: np.random.Generator, *, tail: bool) -> ScoredText:
    books = 42
    book_D = np.repeat(np.arange(books), 1 + rng.poisson(0.6, books))
    tokens_D = np.round(rng.lognormal(5.5, 0.5, len(book_D)))
    hard_G = rng.exponential(1.0, books) - 1 if tail else rng.normal(0, 1, books)
    hard_D = hard_G[book_D]
    losses, experts = [], []
    for mean, loss in (*KNOTS.values(), *RULES.values()):
        own_G = rng.exponential(1.0, books) - 1 if tail else rng.normal(0, 1, books)
        noise_D = rng.normal(0, 0.2, len(book_D)) / np.sqrt(tokens_D)
        losses.append(loss * (1 + 0.3 * hard_D + 0.15 * own_G[book_D]) + noise_D)
        drift = 0.0 if mean.is_integer() else 0.25
        experts.append(mean + drift * hard_D)
    return ScoredText(
        names=(*KNOTS, *RULES),
        losses_DC=np.stack(losses, axis=1) * tokens_D[:, None],
        cost_DC=np.stack(experts, axis=1) * tokens_D[:, None],
        tokens_D=tokens_D,
        clusters_D=np.array([f"{book}" for book in book_D]),
        draws_D=np.zeros(len(book_D), dtype=np.int64),
        domains_D=np.array(["prose"] * len(book_D)),
    )


def measure(trials: int, *, tail: bool, simultaneous: bool) -> dict[str, float]:
    """Share of intervals that hold the truth (joint: of data sets where all four do)."""
    rng = np.random.default_rng(0)
    held = {"difference": 0.0, "saved": 0.0}
    for seed in range(trials):
        text = draw(rng, tail=tail)
        found = compare_at_equal_cost(
            text, list(RULES), [STATIC], resamples=1000, seed=seed, simultaneous=simultaneous
        )
        inside: dict[str, list[bool]] = {"difference": [], "saved": []}
        for rule in RULES:
            own, (difference, saved) = found[rule, "top_k"], truth(rule)
            inside["difference"].append(own.low <= difference <= own.high)
            inside["saved"].append(own.saved_low <= saved <= own.saved_high)
        for name, flags in inside.items():
            held[name] += float(np.all(flags) if simultaneous else np.mean(flags))
    return {name: count / trials for name, count in held.items()}


@pytest.mark.full
@pytest.mark.parametrize("simultaneous", [False, True], ids=["alone", "joint"])
@pytest.mark.parametrize(
    ("tail", "least", "most"), [(False, 0.92, 0.98), (True, 0.88, 0.96)], ids=["normal", "long"]
)
def test_intervals_at_equal_cost_hold_the_truth_nearly_as_often_as_they_say(
    tail: bool, least: float, most: float, simultaneous: bool
) -> None:
    # 400 data sets: one standard error of a joint share is 1.1 to 1.5 points.
    measured = measure(400, tail=tail, simultaneous=simultaneous)
    assert all(least <= share <= most for share in measured.values())
