"""Goals of a search for tuning parameters, and the settings that it found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bh_routing.errors import InputError
from bh_routing.experiments.variants import Variant
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import make_rule, rule_to_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """A rule variant and its target mean number of experts."""

    variant: Variant
    budget: float

    @property
    def config_name(self) -> str:
        """For example `bh_drop-block-sensitivity@5`."""
        return f"{self.variant.name}@{self.budget:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The tuning parameter's value found for a goal."""

    goal: Goal
    rule: Rule
    knob: float
    mean_experts: float
    """Measured under the rule on the text of the search."""
    cost: float
    """The same in the unit of the budget: mean experts, or in a search by decode steps the distinct
    experts as a fraction of those that the model's own top-k reads."""
    delta_nll: float
    """Increase in loss over the model's own top-k on that text, in nats per token."""
    corrections: int
    """Number of runs of the rule, each with a shifted target, before this value was found."""
    unreachable: str | None
    """Why the budget isn't met, with the closest mean; None if it is met."""

    def to_document(self, search: str) -> dict[str, Any]:
        """Return plain data; `search` identifies the search's model, text and calibration."""
        variant = self.goal.variant
        return {
            "config_name": self.goal.config_name,
            "rule": variant.method,
            "variant": variant.label,
            "knob": self.knob,
            "knob_field": variant.knob.name,
            "config": rule_to_config(self.rule),
            "budget": self.goal.budget,
            "calibration_mean_experts": self.mean_experts,
            "calibration_cost": self.cost,
            "calibration_delta_nll": self.delta_nll,
            "corrections": self.corrections,
            "unreachable": self.unreachable,
            "search": search,
        }


def recall_settings(
    goals: Iterable[Goal],
    documents: Iterable[Mapping[str, Any]],
    search_of: Callable[[Variant], str],
    rule_at: Callable[[Variant, float], Rule],
) -> dict[str, Setting]:
    """Return the settings that an earlier search found for these goals; name -> setting.

    Args:
        goals: the goals.
        documents: settings, as returned by `Setting.to_document`.
        search_of: identifies the search for a variant; settings of other searches are ignored.
        rule_at: builds a variant's rule for a value of its tuning parameter.
    """
    stored = {entry.get("config_name"): entry for entry in documents}
    found = {}
    for goal in goals:
        entry = stored.get(goal.config_name)
        setting = None if entry is None else _recall(goal, entry, search_of(goal.variant), rule_at)
        if setting is not None:
            found[goal.config_name] = setting
    return found


def _recall(
    goal: Goal, entry: Mapping[str, Any], search: str, rule_at: Callable[[Variant, float], Rule]
) -> Setting | None:
    try:
        if (entry["search"], entry["budget"]) != (search, goal.budget):
            return None
        setting = Setting(
            goal=goal,
            rule=make_rule(entry["config"]),
            knob=entry["knob"],
            mean_experts=entry["calibration_mean_experts"],
            cost=entry.get("calibration_cost", entry["calibration_mean_experts"]),
            delta_nll=entry["calibration_delta_nll"],
            corrections=entry["corrections"],
            unreachable=entry["unreachable"],
        )
        is_same_rule = setting.rule == rule_at(goal.variant, setting.knob)
    except (KeyError, TypeError, InputError):
        return None
    return setting if is_same_rule else None
