"""Score rules on given text, without generation: `bh-routing evaluate`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bh_routing.engine.texts import packaged_documents, read_documents
from bh_routing.experiments.budget import bring_to_budget
from bh_routing.experiments.calibrating import check_held_out, obtain_calibration
from bh_routing.experiments.executors import choose_threads, torch_threads
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.fitting import fit_to_config, fit_to_loaded
from bh_routing.experiments.folder_lock import only_writer
from bh_routing.experiments.identity import identify
from bh_routing.experiments.quality import QualityLedger, QualityText, prepare_text, score_missing
from bh_routing.experiments.ray_executor import make_executor
from bh_routing.experiments.specs import RunSpec, make_rules
from bh_routing.models.load import load_model
from bh_routing.models.routers import ModelFacts, describe_model
from bh_routing.models.routing import bind_rule
from bh_routing.results.records import QualityRecord
from bh_routing.rules.base import Rule

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """The text to score and its division into windows."""

    texts: Sequence[str | Path] = ()
    """Files or datasets; empty: the packaged evaluation text."""
    max_tokens: int | None = None
    """Total number of scored tokens; None: all."""
    window: int | None = None
    """Input tokens per forward pass; None: the model's context, 1,024 at most."""
    stride: int | None = None
    """Scored tokens of each window after a document's first; None: the window."""
    output: Path | None = None
    """Folder that stores every record, so that a stopped evaluation resumes; None: no storage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Records of every rule and document, with the model and text that they describe."""

    records: list[QualityRecord]
    facts: ModelFacts
    text: QualityText
    left_out: dict[str, str]
    """Standard configurations that the model can't run -> reason."""
    calibration_tokens: int
    """0 if no rule needed a calibration."""
    seconds: float
    """Scoring alone."""


def evaluate(spec: RunSpec, options: EvaluateOptions) -> Evaluation:
    """Compare configurations with the model's own top-k on text, token by token.

    Args:
        spec: model, configurations and calibration; prompts and output aren't used.
        options: the text, and how it is divided.
    Raises:
        InputError: model, text, calibration or a configuration can't be used.
    """
    documents = read_documents(options.texts) if options.texts else packaged_documents("evaluation")
    fitted = fit_to_config(spec)
    check_held_out(spec, make_rules(fitted.spec.configs, spec.budget), documents)
    model, tokenizer = load_model(
        spec.model, device=spec.device, dtype=spec.dtype, device_map=spec.device_map
    )
    facts = describe_model(model)
    spec, left_out = fit_to_loaded(fitted, model)
    rules = make_rules(spec.configs, spec.budget)
    text = prepare_text(
        tokenizer,
        facts,
        documents,
        max_tokens=options.max_tokens,
        window=options.window,
        stride=options.stride,
        batch_size=spec.batch_size,
    )
    with ExitStack() as stack:
        stack.enter_context(torch_threads(choose_threads(model).batch))
        calibration = obtain_calibration(spec, rules, model, tokenizer).calibration
        rules = bring_to_budget(spec, rules, model, tokenizer, calibration).rules
        for named in rules:
            bind_rule(model, named.rule, calibration)
        identity = identify(spec.model, model, tokenizer)
        start = time.perf_counter()
        folder = options.output or Path(stack.enter_context(TemporaryDirectory()))
        stack.enter_context(only_writer(folder))
        ledger = stack.enter_context(QualityLedger(folder, text, identity))
        subject = Subject(model, tokenizer, calibration)
        executor = stack.enter_context(make_executor(spec, subject))
        by_name = {named.name: named.rule for named in rules}
        records = score_missing(model, tokenizer, text, by_name, calibration, ledger, executor)
    return Evaluation(
        records=records,
        facts=facts,
        text=text,
        left_out=left_out,
        calibration_tokens=calibration.num_tokens if calibration else 0,
        seconds=time.perf_counter() - start,
    )


def score_loaded(
    subject: Subject, text: QualityText, rules: Mapping[str, Rule]
) -> list[QualityRecord]:
    """Score rules on text with a loaded model, and keep no file.

    Raises:
        ExperimentError: as `score_missing`.
    """
    model, tokenizer, calibration = subject
    identity = identify("model", model, tokenizer)
    with TemporaryDirectory() as folder, QualityLedger(Path(folder), text, identity) as ledger:
        return score_missing(model, tokenizer, text, rules, calibration, ledger)
