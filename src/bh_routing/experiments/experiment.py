"""One experiment: generate from one prompt under one rule and measure it, without writing files."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bh_routing.engine.generate import Generation, RoutedGeneration, encode_prompt, generate_routed
from bh_routing.errors import ExperimentError
from bh_routing.experiments.configurations import NamedRule
from bh_routing.experiments.run_log import FILE_ONLY
from bh_routing.experiments.specs import Prompt
from bh_routing.models.routing import bind_rule, install
from bh_routing.models.trace import ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import STATUS_FAILED, ExperimentDetail, ExperimentRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.plan import Candidates, Selector
from bh_routing.stats.load_balance import load_columns

ResultT = TypeVar("ResultT")

log = logging.getLogger(__name__)

OUT_OF_MEMORY: Final = (
    "out of memory; use --device cpu, a smaller batch size, fewer tokens, or a smaller dtype than "
    "float32"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that the device or the machine is out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU torch raises a plain RuntimeError, recognizable only by its message.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory() -> None:
    """Release unused memory of the process and the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find_nan(
    model: Any, rule: Rule, calibration: Calibration | None, token_ids: Sequence[int]
) -> str:
    """Run a sequence again and return a sentence that names the first router with NaN or infinity.

    Args:
        model, rule, calibration: as for `route`.
        token_ids: a sequence that gave NaN.
    """
    bound = bind_rule(model, rule, calibration)
    is_finite: dict[str, Tensor] = {}

    def watched(name: str, select: Selector) -> Selector:
        def note(candidates: Candidates) -> Tensor:
            is_finite[name] = candidates.router_logits_TE.isfinite().all()
            return select(candidates)

        return note

    names = [f"{site.name} (layer {site.layer})" for site in bound.routers.sites]
    selectors = tuple(map(watched, names, bound.selectors))
    with torch.inference_mode(), install(model, replace(bound, selectors=selectors)):
        model(torch.tensor([list(token_ids)], device=model.device), use_cache=False)
    first = next((name for name in names if name in is_finite and not is_finite[name]), None)
    where = "the model's output is NaN, though every router's logits are finite"
    if first is not None:
        where = f"router {first} gave NaN or infinite logits"
    return f"{where}; the checkpoint is damaged or the dtype too narrow: try float32"


WARM_UP_TOKENS = 2
"""A prefill and a decode step."""


class Experiment(NamedTuple):
    """Measurements of one experiment: the row, and details too long for a row."""

    record: ExperimentRecord
    detail: ExperimentDetail


class Subject(NamedTuple):
    """The model under test, with tokenizer and calibration."""

    model: Any
    tokenizer: Any
    calibration: Calibration | None


def run_experiment(
    subject: Subject, named_rule: NamedRule, prompt: Prompt, max_tokens: int
) -> Experiment:
    """Continue `prompt` greedily under a rule and measure experts, time and load.

    Args:
        subject: model, tokenizer and calibration.
        named_rule: the configuration.
        prompt: the prompt.
        max_tokens: maximum number of generated tokens.
    Returns:
        The record and its detail.
    Raises:
        InputError: the rule doesn't fit the model, or needs a calibration.
        ExperimentError: the model gave NaN; the message names the first router.
    """
    device = subject.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generation, trace = _generate(subject, named_rule, prompt, max_tokens)
    if generation.has_nan:
        ids = [*encode_prompt(subject.tokenizer, prompt.text), *generation.token_ids]
        raise ExperimentError(find_nan(subject.model, named_rule.rule, subject.calibration, ids))
    peak = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
    return _summarise(generation, trace, named_rule.name, prompt, peak)


def warm_up(subject: Subject, named_rule: NamedRule, prompt: Prompt) -> None:
    """Run a rule once, untimed, to keep one-off costs out of the first experiment."""
    _generate(subject, named_rule, prompt, WARM_UP_TOKENS)


def _generate(
    subject: Subject, named_rule: NamedRule, prompt: Prompt, max_tokens: int
) -> RoutedGeneration:
    model, tokenizer, calibration = subject
    return generate_routed(model, tokenizer, prompt.text, max_tokens, named_rule.rule, calibration)


def failed_experiment(named_rule: NamedRule, prompt: Prompt, error: str) -> Experiment:
    """Return the row of a failed experiment."""
    record = ExperimentRecord(
        config_name=named_rule.name,
        prompt_text=prompt.text,
        prompt_category=prompt.category,
        prompt_description=prompt.description,
        status=STATUS_FAILED,
        error=error.encode(errors="backslashreplace").decode(),  # file names may be invalid UTF-8
    )
    return Experiment(record, ExperimentDetail())


def _summarise(
    generation: Generation, trace: ExpertTrace, config_name: str, prompt: Prompt, peak: int | None
) -> Experiment:
    counts_TL = trace.expert_counts.numpy()
    assignments_LE = trace.utilization.numpy()
    prefill = trace.forward_tokens[0]
    longest = int(counts_TL.max())
    histogram = [np.bincount(layer_T, minlength=longest + 1).tolist() for layer_T in counts_TL.T]
    seconds = generation.inference_time_sec
    record = ExperimentRecord(
        config_name=config_name,
        prompt_text=prompt.text,
        prompt_category=prompt.category,
        prompt_description=prompt.description,
        generated_text=generation.text,
        num_input_tokens=generation.num_input_tokens,
        num_output_tokens=len(generation.token_ids),
        avg_experts_per_token=float(counts_TL.mean()),
        std_experts_per_token=float(counts_TL.std()),
        min_experts=float(counts_TL.min()),
        max_experts=float(counts_TL.max()),
        avg_experts_prefill=float(counts_TL[:prefill].mean()),
        avg_experts_decode=(
            float(counts_TL[prefill:].mean()) if len(counts_TL) > prefill else math.nan
        ),
        inference_time_sec=seconds,
        prefill_time_sec=generation.prefill_time_sec,
        decode_time_sec=generation.decode_time_sec,
        tokens_per_sec=len(generation.token_ids) / seconds if seconds > 0 else math.nan,
        **load_columns(assignments_LE, histogram),
    )
    detail = ExperimentDetail(
        output_token_ids=list(generation.token_ids),
        experts_by_layer=counts_TL.mean(axis=0).tolist(),
        count_histogram=histogram,
        expert_load=assignments_LE.tolist(),
        peak_memory_bytes=peak,
    )
    return Experiment(record, detail)


class Attempts:
    """Steps after the experiments, whose failure must not end the run."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """One sentence per failed step."""

    def __call__(self, name: str, step: Callable[[], ResultT]) -> ResultT | None:
        """Return the step's result; None if it failed."""
        try:
            return step()
        except Exception as error:  # finished experiments are on disk: report the failure and go on
            log.exception("%s failed", name, extra=FILE_ONLY)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if is_out_of_memory(error):
                reason = OUT_OF_MEMORY
            self.problems.append(f"{name} failed ({reason}); every finished experiment is kept")
            return None
