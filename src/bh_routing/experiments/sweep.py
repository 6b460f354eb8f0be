"""Compare rules at equal cost, tuned on calibration text, scored on another."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from bh_routing.errors import InputError, ResultsError
from bh_routing.experiments import step_sweep
from bh_routing.experiments.calibrating import (
    calibration_documents,
    check_calibration_overlap,
    check_overlap,
    obtain_calibration,
    save_calibration,
)
from bh_routing.experiments.configurations import NamedRule
from bh_routing.experiments.executors import torch_threads
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.folder import only_writer
from bh_routing.experiments.identity import RunIdentity, collect_provenance, device_name, identify
from bh_routing.experiments.preparation import Loaded, load
from bh_routing.experiments.quality import (
    QualityLedger,
    score_missing,
    scored_documents,
    static_references,
)
from bh_routing.experiments.quality_text import QualityText, scored_text
from bh_routing.experiments.ray_executor import make_executor
from bh_routing.experiments.search import KnobSearch, check_budgets, check_fractions
from bh_routing.experiments.settings import Goal, Setting
from bh_routing.experiments.specs import SweepSpec
from bh_routing.experiments.step_sweep import STEP_BUDGETS
from bh_routing.experiments.variants import Variant, parse_variants
from bh_routing.models.routers import find_routers
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.files import read_json_object, render_json, write_atomically
from bh_routing.results.records import RUN_JSON, SCHEMA_VERSION, QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import rule_to_config
from bh_routing.rules.fixed import PerLayerTopK, TopK
from bh_routing.rules.mass import TopP

KIND: Final = "sweep"
SWEEP_JSON: Final = "sweep.json"
CURVES: Final = (TopP.method, PerLayerTopK.method)
"""Reference rules for comparisons at equal cost, in addition to static top-k."""

log = logging.getLogger(__name__)


def sweep(spec: SweepSpec) -> dict[str, Any]:
    """Tune rules to budgets on calibration text, and score them on evaluation text.

    A stopped sweep resumes where it stopped: known tuning parameters and scores are read from the
    folder.

    Args:
        spec: the sweep's spec.
    Returns:
        The content of run.json.
    Raises:
        InputError: model, text, calibration, a rule or the folder can't be used.
    """
    start = time.perf_counter()
    by_step = spec.cost == "distinct"
    takes_defaults = by_step and spec.rules == SweepSpec.model_fields["rules"].default
    variants = [] if takes_defaults else parse_variants(spec.rules)
    documents = scored_documents(spec)
    check_overlap(documents, calibration_documents(spec.calibration_texts))
    if spec.calibration is not None:
        kept = Calibration.load(spec.calibration)
        check_calibration_overlap(documents, kept, f"calibration {spec.calibration}")
    read_stored_sweep(spec.output)
    loaded = load(spec)
    if takes_defaults:
        variants = parse_variants(step_sweep.default_rules(find_routers(loaded.model)))
    budgets = list(dict.fromkeys(spec.budgets))
    if by_step:
        budgets = budgets or list(STEP_BUDGETS)
        check_fractions(budgets)
    else:
        budgets = budgets or default_budgets(loaded.facts.model_top_k)
        check_budgets(budgets, loaded.facts.model_top_k)
    text = scored_text(spec, documents, loaded.tokenizer, loaded.facts)
    spec = spec.model_copy(update={"budgets": budgets})
    with only_writer(spec.output), torch_threads(loaded.threads.batch):
        return _sweep_begun(spec, variants, loaded, text, start)


def _sweep_begun(
    spec: SweepSpec, variants: Sequence[Variant], loaded: Loaded, text: QualityText, start: float
) -> dict[str, Any]:
    """Carry out a validated sweep whose folder is locked."""
    stored = read_stored_sweep(spec.output)
    identity = identify(spec.model, loaded.model, loaded.tokenizer)
    _check_identity(spec.output, stored, identity)
    ledger = QualityLedger.resume(spec.output, text, identity)
    calibrating_since = time.perf_counter()
    calibration, about = _calibrate(spec, variants, loaded, stored)
    if calibration is not None:
        identity = replace(identity, tables=calibration.table_fingerprints)
    _check_identity(spec.output, stored, identity)
    search = KnobSearch(
        loaded.model,
        loaded.tokenizer,
        calibration_documents(spec.calibration_texts),
        calibration,
        batch_size=spec.batch_size,
        decode_batch=spec.decode_batch,
    )
    document = _document(spec, loaded, text, about, search)
    tables = {**stored.get("identity", {}).get("tables", {}), **identity.tables}
    document["identity"] = asdict(replace(identity, tables=tables))
    earlier = {part: stored.get(KIND, {}).get(part, []) for part in ("points", "curve_points")}
    document[KIND] |= earlier
    _write(spec.output, document)
    searching_since = time.perf_counter()
    goals = [Goal(variant=v, budget=b) for v in variants for b in spec.budgets]
    beyond = curve_goals(search, variants, spec.budgets)
    found = search.find([*goals, *beyond], known=[*earlier["points"], *earlier["curve_points"]])
    settings, curve_settings = found[: len(goals)], found[len(goals) :]
    document[KIND]["points"] = search.to_documents(settings)
    document[KIND]["curve_points"] = search.to_documents(curve_settings)
    _write(spec.output, document, settings)
    scoring_since = time.perf_counter()
    subject = Subject(loaded.model, loaded.tokenizer, calibration)
    with ledger, make_executor(spec, subject) as executor:
        score_all = partial(score_missing, subject, ledger, executor=executor)
        references = score_settings(settings, curve_settings, score_all, search)
    end = time.perf_counter()
    document[KIND]["references"] = describe_references(references, search)
    document["timing"] = {
        "load_sec": loaded.seconds,
        "calibrate_sec": searching_since - calibrating_since,
        "search_sec": scoring_since - searching_since,
        "scoring_sec": end - scoring_since,
        "total_sec": end - start,
    }
    _write(spec.output, document)
    log.info(
        "scored %d rules and %d static references in %.1f s; see %s",
        sum(setting.unreachable is None for setting in settings),
        len(references),
        end - start,
        spec.output,
    )
    return document


def default_budgets(model_top_k: int) -> list[float]:
    """Return the default budgets of a sweep.

    Raises:
        InputError: the model uses one expert per token, so none can be dropped.
    Example:
        >>> default_budgets(8), default_budgets(2)
        ([6.0, 5.0, 4.0, 3.0], [1.5, 1.25, 1.0])
    """
    if model_top_k == 1:
        raise InputError(
            "the model uses 1 expert per token, so no rule can leave one out; choose another model"
        )
    budgets = (model_top_k * fraction for fraction in (0.75, 0.625, 0.5, 0.375))
    return [budget for budget in budgets if budget >= 1]


def curve_budgets(budgets: Sequence[float], model_top_k: int) -> list[float]:
    """Return the additional budgets of a reference curve, for interpolation over short distances.

    One lies beyond each end, since a rule's mean on the text differs slightly from its budget, and
    enough lie in between to leave no gap wider than one expert.

    Example:
        >>> curve_budgets([6, 4, 3], model_top_k=8)
        [7.0, 5.0, 2.0]
    """
    ends = [max(1.0, min(budgets) - 1), *budgets, min(float(model_top_k), max(budgets) + 1)]
    found = set(map(float, ends))
    for low, high in pairwise(sorted(found)):
        steps = math.ceil(high - low)
        found |= {low + (high - low) * i / steps for i in range(1, steps)}
    return sorted(found - set(budgets), reverse=True)


def curve_goals(
    search: KnobSearch, variants: Sequence[Variant], budgets: Sequence[float]
) -> list[Goal]:
    """Return further goals of the rules that others are compared with."""
    if search.text.decode_batch is not None:
        return step_sweep.curve_goals(search, variants, budgets)
    return [
        Goal(variant=variant, budget=budget)
        for variant in variants
        if variant.method in CURVES
        for budget in curve_budgets(budgets, search.model_top_k)
    ]


def read_stored_sweep(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's run.json; empty if there is none.

    Raises:
        ResultsError: the folder doesn't hold a sweep.
    """
    path = folder / RUN_JSON
    if not path.exists():
        return {}
    document = read_json_object(path, "choose another --output")
    if (document.get("kind"), document.get("schema_version")) != (KIND, SCHEMA_VERSION):
        raise ResultsError(f"{path} isn't a sweep of this version; choose another --output")
    return document


def _check_identity(folder: Path, stored: Mapping[str, Any], identity: RunIdentity) -> None:
    different = identity.differences(stored.get("identity")) if stored else []
    if different:
        raise ResultsError(
            f"{folder} holds a sweep of something else ({'; '.join(different)}); choose another "
            "--output"
        )


def _calibrate(
    spec: SweepSpec, variants: Sequence[Variant], loaded: Loaded, stored: dict[str, Any]
) -> tuple[Calibration | None, dict[str, Any]]:
    rules = [NamedRule(variant.name, "", variant.anywhere()) for variant in variants]
    calibration, about = obtain_calibration(
        spec,
        rules,
        loaded.model,
        loaded.tokenizer,
        spec.output,
        stored,
        usual_nulls=(),
    )
    if calibration is not None:
        save_calibration(calibration, spec.output)
    return calibration, about or {}


def _document(
    spec: SweepSpec,
    loaded: Loaded,
    text: QualityText,
    about: Mapping[str, Any],
    search: KnobSearch,
) -> dict[str, Any]:
    """Return the content of run.json before the search."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "model": {
            "name": spec.model,
            **asdict(loaded.facts),
            "device_name": device_name(loaded.model.device),
        },
        "provenance": {
            **collect_provenance(spec.seed),
            "threads": loaded.threads.batch,
            "command": spec.command,
        },
        "timing": None,
        "text": {
            "sha256": text.sha256,
            "tokens": sum(len(document.ids) for document in text.documents),
            "documents": text.num_documents,
            "window": text.window,
            "stride": text.stride,
            "decode_batch": text.decode_batch,
        },
        "calibration": {
            **about,
            "search_text_sha256": search.text.sha256,
            "search_tokens": search.num_tokens,
        },
        KIND: {
            "cost": spec.cost,
            "budgets": spec.budgets,
            "points": [],
            "curve_points": [],
            "references": [],
        },
    }


def score_settings(
    settings: Sequence[Setting],
    curve_settings: Sequence[Setting],
    score_all: Callable[[Mapping[str, Rule]], list[QualityRecord]],
    search: KnobSearch,
) -> dict[str, TopK]:
    """Score settings that meet their budgets, then static top-k around each cost and one below."""
    for setting in settings:
        if setting.unreachable is not None:
            log.warning("%s is left out: %s", setting.goal.config_name, setting.unreachable)
    rules = _reached(settings)
    records = score_all(rules | _reached(curve_settings))
    if search.text.decode_batch is not None:
        budgets = [setting.goal.budget for setting in settings]
        static = step_sweep.static_around(search, budgets)
        score_all(static)
        return static
    references = static_references(rules, [r for r in records if r.config_name in rules])
    lowest = min((rule.k for rule in references.values()), default=1)
    if lowest > 1:
        # In some domains and resamples the mean is lower than on the whole text.
        references = {f"topk_{lowest - 1}": TopK(k=lowest - 1)} | references
    score_all(references)
    return references


def describe_references(references: Mapping[str, TopK], search: KnobSearch) -> list[dict[str, Any]]:
    """Return static references as data of run.json; by decode step with their part of the reads."""
    by_step = search.text.decode_batch is not None
    return [
        {"config_name": name, "k": rule.k, "config": rule_to_config(rule)}
        | ({"budget": round(search.cost(rule), 4)} if by_step else {})
        for name, rule in references.items()
    ]


def _reached(settings: Sequence[Setting]) -> dict[str, Rule]:
    return {s.goal.config_name: s.rule for s in settings if s.unreachable is None}


def _write(
    folder: Path, document: Mapping[str, Any], settings: Sequence[Setting] | None = None
) -> None:
    write_atomically(folder / RUN_JSON, render_json(document))
    if settings is None:
        return
    configs = {
        s.goal.config_name: {
            **rule_to_config(s.rule),
            "description": f"{s.goal.variant.label} at a budget of {s.goal.budget:g}",
        }
        for s in settings
        if s.unreachable is None
    }
    write_atomically(folder / SWEEP_JSON, render_json({"configs": configs}))
