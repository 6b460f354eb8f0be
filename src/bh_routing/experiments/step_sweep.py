"""Points of a sweep at equal distinct experts per decode step, besides those at its budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

from bh_routing.experiments.search import KnobSearch
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.variants import Variant
from bh_routing.rules.base import WHOLE
from bh_routing.rules.fixed import TopK

STEP_BUDGETS: Final = (0.75, 0.65)
STEP_RULES: Final = (
    "bh_drop:statistic=sensitivity",
    "bh_drop:scope=step,statistic=sensitivity",
    "bh_drop:scope=step_population,statistic=sensitivity",
    "fisher_mass:statistic=sensitivity",
    "expert_budget:by=gate_mass",
    "oea",
    "top_p",
)
"""Rules of a sweep by default, in addition to static top-k."""
MARGIN: Final = 0.05
"""Distance of a curve's ends from the budgets, as a fraction of what the model's own top-k reads: a
rule reads slightly more or less than its budget on other text."""


def curve_goals(
    search: KnobSearch, variants: Sequence[Variant], budgets: Sequence[float]
) -> list[Goal]:
    """Return further goals of the rules that others are compared with.

    A rule whose tuning parameter is a whole number has a point at each number around the budgets,
    since it misses the budgets themselves; another one has points between and beyond them.
    """
    goals: list[Goal] = []
    for variant in variants:
        if variant.knob.scale is WHOLE:
            costs = {k: search.cost(variant.at(k)) for k in range(1, search.model_top_k + 1)}
            goals += [
                Goal(variant=variant, budget=round(costs[k], 4)) for k in _around(costs, budgets)
            ]
        elif is_reference(variant):
            goals += [Goal(variant=variant, budget=b) for b in _between(budgets)]
    return goals


def is_reference(variant: Variant) -> bool:
    """Return whether other rules are compared with a variant: BH-drop per token, or gate mass."""
    fields = vars(variant.anywhere())
    by_method = {"bh_drop": ("scope", "token"), "expert_budget": ("by", "gate_mass")}
    field, value = by_method.get(variant.method, ("", None))
    return field in fields and fields[field] == value


def static_around(search: KnobSearch, budgets: Sequence[float]) -> dict[str, TopK]:
    """Return static top-k around the budgets, and the model's own top-k."""
    own_k = search.model_top_k
    costs = {k: search.cost(TopK(k=k)) for k in range(1, own_k + 1)}
    return {f"topk_{k}": TopK(k=k) for k in sorted({*_around(costs, budgets), own_k})}


def _around(costs: Mapping[int, float], budgets: Sequence[float]) -> list[int]:
    below = [k for k, cost in costs.items() if cost <= min(budgets) - MARGIN / 2]
    above = [k for k, cost in costs.items() if cost >= max(budgets) + MARGIN / 2]
    return [k for k in costs if max(below, default=0) <= k <= min(above, default=len(costs))]


def _between(budgets: Sequence[float]) -> list[float]:
    """Return budgets beyond both ends and in the middle of wide gaps.

    Example:
        >>> _between([0.75, 0.65])
        [0.6, 0.7, 0.8]
    """
    low, high = max(MARGIN, min(budgets) - MARGIN), min(1.0, max(budgets) + MARGIN)
    ends = sorted({low, *budgets, high})
    middles = [(a + b) / 2 for a, b in pairwise(ends) if b - a > 1.5 * MARGIN]
    return [round(b, 4) for b in sorted({*ends, *middles}) if b not in budgets]
