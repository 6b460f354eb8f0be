"""`--budget`: bring the configurations of a run or an evaluation to one mean number of experts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bh_routing.errors import InputError
from bh_routing.experiments.calibrating import calibration_documents
from bh_routing.experiments.configurations import NamedRule
from bh_routing.experiments.search import KnobSearch
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.specs import EvaluateSpec, LmEvalSpec, RunSpec
from bh_routing.experiments.variants import Variant
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.catalog import rule_to_config
from bh_routing.rules.fixed import TopK

log = logging.getLogger(__name__)


class Budgeted(NamedTuple):
    """Rules at a budget, and the search that led there."""

    rules: list[NamedRule]
    settings: list[dict[str, Any]]
    """For run.json, from which a resumed run reads them."""


def bring_to_budget(
    spec: RunSpec | EvaluateSpec | LmEvalSpec,
    rules: Sequence[NamedRule],
    model: Any,
    tokenizer: Any,
    calibration: Calibration | None,
    known: Sequence[Mapping[str, Any]] = (),
) -> Budgeted:
    """Replace each rule by its variant that uses `spec.budget` experts, named `NAME@BUDGET`.

    Static top-k, the reference of comparisons, is left unchanged, and so is a rule without a tuning
    parameter. Of rules that differ only in their tuning parameter the first is kept; a rule that
    can't meet the budget is left out. Both are logged.

    Args:
        spec: the budget, and the text of the search.
        rules: the requested rules.
        model, tokenizer, calibration: as for `KnobSearch`.
        known: settings of an earlier run of the same folder; matching ones aren't searched again.
    Raises:
        InputError: no rule can meet the budget.
    """
    if spec.budget is None:
        return Budgeted(list(rules), [])
    goals = _goals(rules, spec.budget)
    documents = calibration_documents(spec).documents
    search = KnobSearch(model, tokenizer, documents, calibration, batch_size=spec.batch_size)
    settings = search.find(list(goals.values()), known)
    by_name = {s.goal.variant.name: s for s in settings}
    kept = []
    for named in rules:
        setting = by_name.get(named.name)
        if setting is None:
            if _stays(named):
                kept.append(named)
        elif setting.unreachable is not None:
            log.warning("%s is left out: %s", named.name, setting.unreachable)
        else:
            kept.append(NamedRule(setting.goal.config_name, named.description, setting.rule))
    names = [named.name for named in kept]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two configurations are called {twice!r} at this budget; rename one")
    if settings and all(setting.unreachable for setting in settings):
        raise InputError(f"no rule can meet the budget: {settings[0].unreachable}")
    return Budgeted(kept, search.to_documents(settings))


def _stays(named: NamedRule) -> bool:
    return isinstance(named.rule, TopK) or named.rule.knob is None


def _goals(rules: Sequence[NamedRule], budget: float) -> dict[str, Goal]:
    """Make one goal per rule that differs in more than its tuning parameter; name -> goal."""
    goals: dict[str, Goal] = {}
    names: dict[str, str] = {}
    for named in rules:
        if _stays(named):
            continue
        knob, config = named.rule.knob, rule_to_config(named.rule)
        assert knob is not None  # rules without one were skipped
        rest = repr({field: value for field, value in config.items() if not knob.sets(field)})
        if rest in names:
            log.info(
                "%s is left out: it differs from %s only in %s, which the budget sets",
                named.name,
                names[rest],
                knob.name,
            )
            continue
        names[rest] = named.name
        goals[named.name] = Goal(variant=Variant(name=named.name, config=config), budget=budget)
    return goals
