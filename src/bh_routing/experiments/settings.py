"""Goals of a search and the settings found for them, from and to the plain data of run.json."""

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
    """A variant and the mean number of experts that it is to use."""

    variant: Variant
    budget: float

    @property
    def config_name(self) -> str:
        """Such as `bh_drop-block-sensitivity@5`."""
        return f"{self.variant.name}@{self.budget:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """The value of a knob that was found for a goal."""

    goal: Goal
    rule: Rule
    knob: float
    mean_experts: float
    """On the text of the search, under the rule."""
    delta_nll: float
    """There too, against the model's own top-k, in nats a token."""
    corrections: int
    """How often the rule was run and its target shifted before this value was found."""
    unreachable: str | None
    """Why the budget isn't met, with the closest mean; None if it is."""

    def to_document(self, search: str) -> dict[str, Any]:
        """Return plain data; `search` identifies the model, text and calibration searched on."""
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
    """Find goals among what an earlier search of the same kind wrote; name -> setting.

    Args:
        goals: what is looked for.
        documents: settings as `Setting.to_document` gives them.
        search_of: identifies the search for a variant; settings of another one aren't taken.
        rule_at: the rule that a variant is at a value of its knob.
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
            delta_nll=entry["calibration_delta_nll"],
            corrections=entry["corrections"],
            unreachable=entry["unreachable"],
        )
        is_same_rule = setting.rule == rule_at(goal.variant, setting.knob)
    except (KeyError, TypeError, InputError):
        return None
    return setting if is_same_rule else None
