"""The parts of the protocol of docs/evidence.md, and the estimate of their time and memory.

Axes: L layers, E experts, K kept experts.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.expert_scores import MEANINGS, best_experts, observe_experts
from bh_routing.engine.observe import SlotObserver
from bh_routing.engine.score import score
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, tokenize_documents
from bh_routing.errors import CalibrationError, ResultsError
from bh_routing.experiments.defaults import CALIBRATION_TOKENS
from bh_routing.experiments.evaluate import evaluate
from bh_routing.experiments.evidence import EvidenceSpec
from bh_routing.experiments.experiment import release_memory
from bh_routing.experiments.identity import collect_provenance, device_name, peak_memory_bytes
from bh_routing.experiments.preparation import Loaded, load
from bh_routing.experiments.quality_text import DRAWS, prepare_text
from bh_routing.experiments.search import SEARCH_TOKENS
from bh_routing.experiments.specs import EvaluateSpec, ModelSpec, SweepSpec, make_spec
from bh_routing.experiments.step_sweep import STEP_BUDGETS, default_rules
from bh_routing.experiments.sweep import default_budgets, sweep
from bh_routing.experiments.wrong_drops import WINDOW, judge_rules
from bh_routing.models.expert_axes import Checkpoint, block_of, check_routers, open_checkpoint
from bh_routing.models.prune import write_pruned
from bh_routing.models.routers import find_routers
from bh_routing.models.routing import bind_rule
from bh_routing.nulls import NULLS
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.contributions import OF_SLOTS
from bh_routing.results.files import find_json_object, render_json, write_atomically
from bh_routing.results.records import (
    CALIBRATION,
    CALIBRATION_PART,
    ESTIMATE_JSON,
    NULL_RULES_JSON,
    PRUNING_TABLE_JSON,
    WRONG_DROPS_JSON,
    QualityRecord,
)
from bh_routing.rules import BenjaminiHochberg, BenjaminiHochbergDrop, HigherCriticism, Rule, TopK
from bh_routing.rules.catalog import rule_to_config
from bh_routing.rules.mass import TopP

DECODE_BATCH: Final = 16
ALPHAS: Final = (0.01, 0.05, 0.10)
THRESHOLDS: Final = (4.0, 2.0, 1.0)
"""Of higher criticism."""
KEPT_FRACTIONS: Final = (7 / 8, 3 / 4, 5 / 8, 1 / 2)
"""Fractions of the experts that pruned checkpoints keep."""
MOST_PAIRS: Final = 128 * 128 * 32
"""Experts squared times layers up to which the tables of per_expert take at most 2 GiB."""
_START_SEC: Final = 20.0
"""Imports of a new process, and the conclusion of a part."""
_DECISIONS_SEC: Final = 0.05
"""Decisions of all rules in the part wrong_drops, per layer and window."""
_TRIAL_TOKENS: Final = 64
"""Tokens on which a null distribution is tried out."""
_PROBE_TOKENS: Final = {"cuda": 8_192, "cpu": 1_024}

Analyze = Callable[[Sequence[QualityRecord]], dict[str, Any]]

log = logging.getLogger(__name__)


def run_part(spec: EvidenceSpec, part: str, analyze: Analyze) -> None:
    """Carry out one part; its results go into the folder of its name.

    Args:
        spec: the model and the folder.
        part: a name of EVIDENCE_PARTS, the calibration or the estimate.
        analyze: makes the table of scored rules.
    Raises:
        InputError: the model or its calibration can't be used for this part.
    """
    folder = spec.output / part
    match part:
        case "estimate":
            _estimate(spec, folder)
        case "calibration":
            _calibrate(spec, folder)
        case "equal_cost":
            sweep(make_spec(SweepSpec, **_calibrated(spec, folder)))
        case "decode_steps":
            own = _calibrated(spec, folder)
            sweep(make_spec(SweepSpec, **own, cost="distinct", decode_batch=DECODE_BATCH))
        case "nulls":
            _compare_nulls(spec, folder, analyze)
        case "wrong_drops":
            _judge_drops(spec, folder)
        case _:
            _prune(spec, folder)


def _model(spec: EvidenceSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in ModelSpec.model_fields}


def _calibration_file(spec: EvidenceSpec) -> Path:
    return spec.output / CALIBRATION_PART / CALIBRATION


def _calibrated(spec: EvidenceSpec, folder: Path) -> dict[str, Any]:
    file = _calibration_file(spec)
    return {**_model(spec), "output": folder, "calibration": file, "tokens": spec.tokens}


def _calibrate(spec: EvidenceSpec, folder: Path) -> None:
    """Fit all null distributions that the model has, per_expert only if its tables are small."""
    model, tokenizer, facts, *_ = load(spec)
    nulls = {name for name, null in NULLS.items() if null.needs_table} | {*OF_SLOTS}
    if facts.num_experts**2 * facts.num_layers > MOST_PAIRS:
        nulls.discard("per_expert")
    texts = [document.text for document in packaged_documents("calibration")]
    fit = partial(calibrate, model, tokenizer, texts, seed=spec.seed)
    for null in sorted(nulls):
        try:
            fit(nulls=[null], max_tokens=_TRIAL_TOKENS)
        except CalibrationError as error:
            nulls.discard(null)
            log.warning("%s is left out: %s", null, error)
    fitted = fit(nulls=sorted(nulls), max_tokens=spec.calibration_tokens)
    fitted.check_text()
    fitted.save(folder / CALIBRATION)


def null_rules() -> dict[str, Rule]:
    """Return the rules of the null ablation by their names: label, a bar, and tuning parameter."""
    rules: dict[str, Rule] = {}
    for alpha in ALPHAS:
        at = f"α = {alpha:.2f}"
        for null in NULLS:
            rules[f"bh, {null} | {at}"] = BenjaminiHochberg(alpha, null=null)
        rules[f"by, background | {at}"] = BenjaminiHochberg(alpha, procedure="by")
        rules[f"storey, background | {at}"] = BenjaminiHochberg(alpha, procedure="storey")
        for null in ("background", "permutation", "gaussian"):
            rule = BenjaminiHochberg(alpha, null=null, on_empty="model_k")
            rules[f"bh, {null}, on_empty=model_k | {at}"] = rule
        rules[f"bh_drop, needed | {at}"] = BenjaminiHochbergDrop(alpha, statistic="contribution")
        rules[f"bh_drop, needed, sensitivity | {at}"] = BenjaminiHochbergDrop(
            alpha, statistic="sensitivity"
        )
    for threshold in THRESHOLDS:
        rules[f"higher_criticism, background | threshold = {threshold:g}"] = HigherCriticism(
            threshold
        )
    return rules


def static_rules(model_top_k: int) -> dict[str, Rule]:
    """Return static top-k for every k up to the model's own, by its name in the null ablation."""
    return {f"top_k | k = {k}": TopK(k) for k in range(1, model_top_k + 1)}


def split_by_reach(
    model: Any, rules: Mapping[str, Rule], calibration: Calibration
) -> tuple[dict[str, Rule], dict[str, str]]:
    """Return the rules that the calibration supports, and the reasons for excluding the others."""
    served, excluded = {}, {}
    for name, rule in rules.items():
        try:
            bind_rule(model, rule, calibration)
            served[name] = rule
        except CalibrationError as error:
            excluded[name] = str(error)
    return served, excluded


def _compare_nulls(spec: EvidenceSpec, folder: Path, analyze: Analyze) -> None:
    own = _calibrated(spec, folder)
    loaded = load(spec)
    rules = {**static_rules(loaded.facts.model_top_k), **null_rules()}
    served, excluded = split_by_reach(loaded.model, rules, Calibration.load(own["calibration"]))
    # A configuration's name has no spaces.
    names = {re.sub(r"[^\w.]+", "_", name.replace("α", "alpha")): name for name in served}
    content = {"names": names, "out_of_reach": excluded}
    write_atomically(folder / NULL_RULES_JSON, render_json(content))
    del loaded
    release_memory()
    configs = {short: rule_to_config(served[name]) for short, name in names.items()}
    evaluate(make_spec(EvaluateSpec, **own, configs=configs), analyze)


def _judge_drops(spec: EvidenceSpec, folder: Path) -> None:
    calibration = Calibration.load(_calibration_file(spec))
    loaded = load(spec)
    text = _text(spec, loaded.tokenizer)
    rows = judge_rules(loaded.model, text, calibration.to(loaded.model.device))
    write_atomically(folder / WRONG_DROPS_JSON, render_json({"rows": rows}))


def _text(spec: EvidenceSpec, tokenizer: Any) -> list[TokenizedDocument]:
    return tokenize_documents(tokenizer, packaged_documents("evaluation"), spec.tokens)


def score_with(
    model: Any,
    tokenizer: Any,
    text: Sequence[TokenizedDocument],
    rule: Rule,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Return the sum of the losses of each document's tokens by its key, and the mean experts."""
    records = list(
        score(model, tokenizer, text, {"": rule}, calibration, window=WINDOW, stride=WINDOW)
    )
    return {
        "mean_experts": sum(r.experts_sum for r in records) / sum(r.units for r in records),
        "nll": {record.document_key: record.nll_sum for record in records},
    }


def _prune(spec: EvidenceSpec, folder: Path) -> None:
    """Score checkpoints pruned by each score to each size; the losses of each are kept."""
    checkpoint = open_checkpoint(spec.model)
    model, tokenizer, *_ = load(spec)
    routers = find_routers(model)
    check_routers(checkpoint, routers, spec.model)
    groups = max(site.facts.groups.num_groups if site.facts.groups else 1 for site in routers.sites)
    num_experts = checkpoint.num_experts
    sizes = [int(num_experts * part) // groups * groups for part in KEPT_FRACTIONS]
    use = observe_experts(
        model, tokenizer, packaged_documents("calibration"), by_loss=True,
        max_tokens=min(spec.calibration_tokens, CALIBRATION_TOKENS),
    )  # fmt: skip
    text = _text(spec, tokenizer)
    own = partial(score_with, model, tokenizer, text, TopK(routers.model_top_k))
    losses = {"original": _remembered(folder / "original.json", own)["nll"]}
    del model, own
    release_memory()
    for by in MEANINGS:
        scores_LE = use.scores(by, spec.seed)[:, :num_experts]
        for keep in sizes:
            kept_LK = best_experts(scores_LE, keep, groups).tolist()
            kept = {block_of(s.name): own for s, own in zip(routers.sites, kept_LK, strict=True)}
            make = partial(_score_pruned, spec, checkpoint, kept, tokenizer, text)
            losses[f"{by}-{keep}"] = _remembered(folder / f"{by}-{keep}.json", make)["nll"]
    documents = [{"key": d.key, "cluster": d.cluster, "tokens": len(d.ids)} for d in text]
    content = {"num_experts": num_experts, "sizes": sizes, "documents": documents, "nll": losses}
    write_atomically(folder / PRUNING_TABLE_JSON, render_json(content))


def _remembered(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the content of a JSON file, which is made if it is missing."""
    found = find_json_object(file)
    if found is None:
        found = make()
        write_atomically(file, render_json(found))
        log.info("scored %s", file.stem)
    return found


def _score_pruned(
    spec: EvidenceSpec,
    checkpoint: Checkpoint,
    kept: Mapping[str, Sequence[int]],
    tokenizer: Any,
    text: Sequence[TokenizedDocument],
) -> dict[str, Any]:
    with TemporaryDirectory(dir=spec.output / "pruning") as temporary:
        folder = Path(temporary) / "pruned"
        write_pruned(checkpoint, kept, {}, folder)
        model = load(spec.model_copy(update={"model": str(folder)})).model
        scored = score_with(model, tokenizer, text, TopK(find_routers(model).model_top_k))
    del model
    release_memory()
    return scored


def _estimate(spec: EvidenceSpec, folder: Path) -> None:
    """Time the two kinds of passes on a little text, and multiply."""
    loaded = load(spec)
    model, facts = loaded.model, loaded.facts
    known = find_json_object(folder / ESTIMATE_JSON) or {}
    if known.get("model", {}).get("fingerprint", facts.fingerprint) != facts.fingerprint:
        raise ResultsError(
            f"{spec.output} holds evidence of another model named {spec.model}; choose another "
            "--output"
        )
    per_token = _seconds_per_token(loaded)
    per_gradient, gives_gradients = _seconds_per_gradient(loaded)
    lengths = [len(document.ids) for document in _text(spec, loaded.tokenizer)]
    num_tokens, windows = sum(lengths), sum(math.ceil(length / WINDOW) for length in lengths)
    budgets, top_k = default_budgets(facts.model_top_k), facts.model_top_k
    num_rules = len(SweepSpec.model_fields["rules"].default)
    points = num_rules * len(budgets) + 6 + top_k
    step_points = len(default_rules(find_routers(model))) * len(STEP_BUDGETS) + 14 + top_k
    pruned = len(MEANINGS) * len(KEPT_FRACTIONS) + 1
    search = 2 * SEARCH_TOKENS
    seconds = {
        "calibration": per_gradient * spec.calibration_tokens,
        "equal_cost": per_token * points * (num_tokens + search),
        "decode_steps": per_token * step_points * (DRAWS * num_tokens + search),
        "nulls": per_token * (len(null_rules()) + top_k) * num_tokens,
        "wrong_drops": per_gradient * num_tokens + _DECISIONS_SEC * facts.num_layers * windows,
        "pruning": per_gradient * CALIBRATION_TOKENS + per_token * pruned * num_tokens,
    }
    content = {
        "model": {
            **asdict(facts),
            "device_name": device_name(model.device),
        },
        "provenance": collect_provenance(spec.seed),
        "gives_gradients": gives_gradients,
        "scored_tokens": num_tokens,
        "memory_bytes": peak_memory_bytes(model.device),
        "seconds": {part: value + loaded.seconds + _START_SEC for part, value in seconds.items()},
    }
    write_atomically(folder / ESTIMATE_JSON, render_json(content))


def _seconds_per_token(loaded: Loaded) -> float:
    """Return the time of scoring one token under one rule."""
    model, tokenizer, facts, *_ = loaded
    text = prepare_text(
        tokenizer, facts, packaged_documents("evaluation"),
        max_tokens=_PROBE_TOKENS[model.device.type],
    )  # fmt: skip
    rules = {"one": TopK(1), "half": TopP(0.5)}
    seconds = 0.0
    for _ in range(2):  # the first includes warm-up
        start = time.perf_counter()
        records = list(
            score(model, tokenizer, text.documents, rules, window=text.window, stride=text.stride)
        )
        seconds = time.perf_counter() - start
    passes = len(rules) + 1
    return seconds / (sum(record.tokens for record in records) / len(rules) * passes)


def _seconds_per_gradient(loaded: Loaded) -> tuple[float, bool]:
    """Return the time per token of a pass with gradients, and whether the model gives them."""
    model, tokenizer, *_ = loaded
    (document, *_) = tokenize_documents(tokenizer, packaged_documents("calibration"), None)
    ids_1S = torch.tensor([document.ids[:WINDOW]], device=model.device)
    for by_loss in (True, False):
        observer = SlotObserver(model, find_routers(model), by_loss=by_loss)
        try:
            observer.read(ids_1S)  # warm-up
            start = time.perf_counter()
            observer.read(ids_1S)
            return (time.perf_counter() - start) / ids_1S.shape[1], by_loss
        except CalibrationError as error:
            log.info("%s", error)
        finally:
            observer.close()
    return 0.0, False
