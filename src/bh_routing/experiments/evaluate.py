"""Score rules on given text, without generation: `bh-routing evaluate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bh_routing.engine.score import check_steps
from bh_routing.experiments.budget import bring_to_budget
from bh_routing.experiments.calibrating import check_held_out, obtain_calibration
from bh_routing.experiments.configurations import make_rules
from bh_routing.experiments.executors import choose_threads, torch_threads
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.folder import only_writer
from bh_routing.experiments.identity import identify
from bh_routing.experiments.preparation import fit_to_config, fit_to_loaded
from bh_routing.experiments.quality import QualityLedger, score_missing, scored_documents
from bh_routing.experiments.quality_text import QualityText, scored_text
from bh_routing.experiments.ray_executor import make_executor
from bh_routing.experiments.specs import EvaluateSpec
from bh_routing.models.load import load_model
from bh_routing.models.routers import describe_model
from bh_routing.models.routing import bind_rule
from bh_routing.results.files import render_csv, render_json, write_atomically
from bh_routing.results.records import QualityRecord
from bh_routing.rules.base import Rule


def evaluate(
    spec: EvaluateSpec, analyze: Callable[[Sequence[QualityRecord]], dict[str, Any]]
) -> dict[str, Any]:
    """Compare configurations with the model's own top-k on text, token by token.

    Args:
        spec: the evaluation's spec; without an output folder nothing is kept.
        analyze: makes quality.json's table of the records.
    Returns:
        The content of quality.json.
    Raises:
        InputError: model, text, calibration or a configuration can't be used.
    """
    documents = scored_documents(spec)
    fitted = fit_to_config(spec)
    check_held_out(spec, make_rules(fitted.spec.configs, spec.budget), documents)
    model, tokenizer = load_model(
        spec.model, device=spec.device, dtype=spec.dtype, device_map=spec.device_map
    )
    facts = describe_model(model)
    spec, left_out = fit_to_loaded(fitted, model)
    rules = make_rules(spec.configs, spec.budget)
    text = scored_text(spec, documents, tokenizer, facts)
    check_steps((named.rule for named in rules), spec.decode_batch)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(choose_threads(model).batch))
        calibration, _ = obtain_calibration(spec, rules, model, tokenizer)
        rules, _ = bring_to_budget(spec, rules, model, tokenizer, calibration)
        for named in rules:
            bind_rule(model, named.rule, calibration)
        identity = identify(spec.model, model, tokenizer)
        start = time.perf_counter()
        folder = spec.output or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(only_writer(folder))
        ledger = stack.enter_context(QualityLedger.resume(folder, text, identity))
        subject = Subject(model, tokenizer, calibration)
        executor = stack.enter_context(make_executor(spec, subject))
        by_name = {named.name: named.rule for named in rules}
        records = score_missing(subject, ledger, by_name, executor)
        seconds = time.perf_counter() - start
        document = {
            "model": spec.model,
            "model_fingerprint": facts.fingerprint,
            "dtype": facts.dtype,
            "device": facts.device,
            "left_out": left_out,
            "text_sha256": text.sha256,
            "window": text.window,
            "stride": text.stride,
            "decode_batch": text.decode_batch,
            "calibration_tokens": calibration.num_tokens if calibration else 0,
            "seconds": round(seconds, 2),
        } | analyze(records)
        _write(folder, document)
    return document


def _write(folder: Path, document: Mapping[str, Any]) -> None:
    write_atomically(folder / "quality.json", render_json(document))
    flat = [
        {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        for row in document["rules"]
    ]
    write_atomically(folder / "quality.csv", render_csv(flat))


def score_loaded(
    subject: Subject, text: QualityText, rules: Mapping[str, Rule]
) -> list[QualityRecord]:
    """Score rules on text with a loaded model, and keep no file.

    Raises:
        ExperimentError: as `score_missing`.
    """
    identity = identify("model", subject.model, subject.tokenizer)
    with TemporaryDirectory() as folder, QualityLedger(Path(folder), text, identity) as ledger:
        return score_missing(subject, ledger, rules)
