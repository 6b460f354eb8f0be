"""Bring rules to mean numbers of experts: a run's own, and alternatives to its BH rules."""

from __future__ import annotations

import logging
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from bh_routing.errors import InputError
from bh_routing.experiments.calibrating import (
    calibration_documents,
    check_overlap,
    obtain_calibration,
    save_calibration,
)
from bh_routing.experiments.configurations import NamedRule, rule_text
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.quality import scored_documents
from bh_routing.experiments.search import KnobSearch
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.specs import EvaluateSpec, LmEvalSpec, RunSpec
from bh_routing.experiments.variants import Variant
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import ALTERNATIVES, CALIBRATION, QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.catalog import rule_to_config
from bh_routing.rules.drop import BenjaminiHochbergDrop
from bh_routing.rules.fixed import TopK

_DROP: Final = Variant(name="bh_drop", config={"method": "bh_drop", "scope": "population"})
_ESTIMATE_TOKENS: Final = 2_000
"""Tokens of calibration text that an alternative is found on."""
_CARRIED: Final = (
    "device", "dtype", "device_map", "seed", "max_tokens", "chat_template", "texts", "tokens",
    "decode_batch",
)  # fmt: skip
"""Fields of a run's spec that a command repeats unless they are at their defaults."""

log = logging.getLogger(__name__)


def bring_to_budget(
    spec: RunSpec | EvaluateSpec | LmEvalSpec,
    rules: Sequence[NamedRule],
    model: Any,
    tokenizer: Any,
    calibration: Calibration | None,
    known: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[NamedRule], list[dict[str, Any]]]:
    """Replace each rule by its variant that uses `spec.budget` experts, named `NAME@BUDGET`.

    Static top-k, the reference of comparisons, is left unchanged, and so is a rule without a tuning
    parameter. Of rules that differ only in their tuning parameter the first is kept; a rule that
    can't meet the budget is left out. Both are logged.

    Args:
        spec: the budget, and the text of the search.
        rules: the requested rules.
        model, tokenizer, calibration: as for `KnobSearch`.
        known: settings of an earlier run of the same folder; matching ones aren't searched again.
    Returns:
        The rules, and the settings that were found, for run.json.
    Raises:
        InputError: no rule can meet the budget.
    """
    if spec.budget is None:
        return list(rules), []
    goals = _goals(rules, spec.budget)
    documents = calibration_documents(spec.calibration_texts)
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
    return kept, search.to_documents(settings)


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


def losing_budgets(
    rules: Iterable[NamedRule], records: Iterable[QualityRecord], model_top_k: int
) -> list[float]:
    """Return the mean experts, to one decimal, of BH rules that are worse than static top-k.

    Means at which `bh_drop` was scored already are left out.

    Args:
        rules: the configurations of the run.
        records: their scores, and those of static top-k around each mean.
        model_top_k: the model's own k, below which experts can be left out.
    """
    sums: dict[str, Any] = defaultdict(lambda: np.zeros(4))
    methods = {}
    for r in records:
        methods[r.config_name] = r.rule.get("method")
        sums[r.config_name] += (r.experts_sum, r.units, r.nll_sum - r.top_k_nll_sum, r.tokens)
    at = {name: (n[0] / n[1], n[2] / n[3]) for name, n in sums.items() if n[1] and n[3]}
    curve = sorted(point for name, point in at.items() if methods[name] == TopK.method)
    means, losses = zip(*curve, strict=True) if curve else ((), ())
    own = [named.name for named in rules if isinstance(named.rule, BenjaminiHochberg)]
    losing = {
        round(at[name][0], 1)
        for name in own
        if curve and name in at and at[name][1] > np.interp(at[name][0], means, losses)
    }
    drop = BenjaminiHochbergDrop.method
    scored = {round(mean, 1) for name, (mean, _) in at.items() if methods[name] == drop}
    return sorted(b for b in losing - scored if 1 <= b < model_top_k)


def find_alternatives(
    spec: RunSpec,
    budgets: Sequence[float],
    taken: Iterable[str],
    subject: Subject,
    stored: Mapping[str, Any],
) -> tuple[Subject, list[dict[str, Any]], dict[str, Any] | None]:
    """Find `bh_drop` at these mean numbers of experts.

    Args:
        spec: the run's spec, whose folder keeps the calibration.
        budgets: mean numbers of experts.
        taken: names of configurations.
        subject: the model.
        stored: run.json; the alternatives of an earlier run aren't searched again.
    Returns:
        The subject with the calibration of `bh_drop`; config_name, budget, config and search of
        each alternative; and the calibration's entry in run.json.
    Raises:
        InputError: the scored text shares a passage with the calibration text.
        CalibrationError: the calibration has no tables for `bh_drop`, or the model no gradients.
    """
    documents = calibration_documents(spec.calibration_texts)
    check_overlap(scored_documents(spec), documents)
    named = NamedRule(_DROP.name, "", _DROP.anywhere())
    model, tokenizer, _ = subject
    calibration, about = obtain_calibration(
        spec, [named], model, tokenizer, spec.output, stored, usual_nulls=()
    )
    assert calibration is not None  # bh_drop needs one
    save_calibration(calibration, spec.output)
    before = stored.get("calibration")
    if about and before and about is not before:
        about = {**about, "seconds": before["seconds"] + about["seconds"]}
    search = KnobSearch(
        model, tokenizer, documents, calibration, _ESTIMATE_TOKENS, batch_size=spec.batch_size
    )
    key = search.key_of(_DROP)
    earlier = (stored.get(ALTERNATIVES) or {}).get("rules", ())
    known = {entry["budget"]: entry["config"] for entry in earlier if entry["search"] == key}
    found = []
    for budget in budgets:
        goal = Goal(variant=_DROP, budget=budget)
        name = goal.config_name
        while name in taken:
            name = f"found_{name}"
        config = known.get(budget) or rule_to_config(search.estimate(goal))
        # Four digits: the command that states it becomes a configuration's name.
        config = {**config, "alpha": float(f"{config['alpha']:.4g}")}
        found.append({"config_name": name, "budget": budget, "config": config, "search": key})
    return Subject(model, tokenizer, calibration), found, about


def command_of(spec: RunSpec, rule: Rule, baseline: TopK) -> str | None:
    """Return the command that runs a rule with a run's settings; None if no option can state it.

    The calibration is that of the run's folder, so the rule makes the same decisions.

    Args:
        spec: the run's spec.
        rule: the rule.
        baseline: the model's own top-k, which the command runs as well.
    """
    texts = [rule_text(each) for each in dict.fromkeys((baseline, rule))]
    if None in texts:
        return None
    words = ["bh-routing", "run", "--model", spec.model]
    words += [word for text in texts for word in ("--rule", str(text))]
    if rule.required_null is not None:
        words += ["--calibration", str(Path(spec.output) / CALIBRATION)]
    for name in _CARRIED:
        value = getattr(spec, name)
        if value != type(spec).model_fields[name].get_default(call_default_factory=True):
            is_list = isinstance(value, list)
            flag = f"--{(name.removesuffix('s') if is_list else name).replace('_', '-')}"
            words += [
                part for item in (value if is_list else [value]) for part in (flag, str(item))
            ]
    return shlex.join([*words, "--output", f"{spec.output}-{rule.method}"])
