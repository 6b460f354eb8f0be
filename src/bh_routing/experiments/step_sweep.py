"""Points of a sweep at equal distinct experts per decode step, in addition to its budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

from bh_routing.experiments.search import KnobSearch
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.variants import Variant
from bh_routing.models.routers import Routers
from bh_routing.rules.base import WHOLE
from bh_routing.rules.fixed import TopK

STEP_BUDGETS: Final = (0.75, 0.65)
SPACING: Final = 0.05
"""Distance of a curve's points, as a fraction of the model's own top-k's reads."""
MARGIN: Final = 0.1
"""Distance of a curve's ends from the budgets: on other text a rule reads slightly more or less
than its budget, and a budget of experts a twentieth."""


def default_rules(routers: Routers) -> list[str]:
    """Return the rules of a sweep by default, in addition to static top-k.

    Steps are refilled from twice the model's own k; more gained nothing on calibration text.
    """
    refill = min(2 * routers.model_top_k, routers.most_slots)
    return [
        "bh_drop:statistic=sensitivity",
        f"bh_drop:scope=step,statistic=sensitivity,refill={refill}",
        f"bh_drop:scope=step_population,statistic=sensitivity,refill={refill}",
        "bh_drop:scope=step_population,statistic=sensitivity",
        f"fisher_mass:statistic=sensitivity,refill={refill}",
        f"expert_budget:by=gate_mass,refill={refill}",
        f"oea:refill={refill}",
        "top_p",
    ]


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
    below = [k for k, cost in costs.items() if cost <= min(budgets) - SPACING]
    above = [k for k, cost in costs.items() if cost >= max(budgets) + SPACING]
    return [k for k in costs if max(below, default=0) <= k <= min(above, default=len(costs))]


def _between(budgets: Sequence[float]) -> list[float]:
    """Return budgets beyond both ends and within wide gaps.

    Example:
        >>> _between([0.75, 0.65])
        [0.55, 0.6, 0.7, 0.8, 0.85]
    """
    low, high = max(SPACING, min(budgets) - MARGIN), min(1.0, max(budgets) + MARGIN)
    found = {low, high}
    for start, end in pairwise(sorted({low, *budgets, high})):
        steps = round((end - start) / SPACING)
        found |= {start + (end - start) * i / steps for i in range(1, steps)}
    return [round(b, 4) for b in sorted(found) if round(b, 4) not in budgets]
