"""One experiment: one prompt continued under one rule, measured. Writes no file."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from bh_routing.engine.generate import Generation, RoutedGeneration, generate_routed
from bh_routing.engine.prompts import encode_prompt
from bh_routing.errors import ExperimentError
from bh_routing.experiments.failures import find_nan
from bh_routing.experiments.metrics import load_balance
from bh_routing.experiments.spec import NamedRule, Prompt
from bh_routing.models.trace import ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.records import STATUS_FAILED, ExperimentDetail, ExperimentRecord

WARM_UP_TOKENS = 2
"""A prefill and a decode step."""


class Experiment(NamedTuple):
    """What one experiment measured: the row, and what is too long for a row."""

    record: ExperimentRecord
    detail: ExperimentDetail


class Subject(NamedTuple):
    """What experiments are done on."""

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
        prompt: the text to continue.
        max_tokens: most tokens to generate.
    Returns:
        The record and its detail.
    Raises:
        InputError: the rule doesn't fit the model, or needs a calibration.
        ExperimentError: the model gave NaN; the text says from which layer on.
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
    """Run a rule once, untimed, so that one-off costs don't fall on the first experiment."""
    _generate(subject, named_rule, prompt, WARM_UP_TOKENS)


def _generate(
    subject: Subject, named_rule: NamedRule, prompt: Prompt, max_tokens: int
) -> RoutedGeneration:
    model, tokenizer, calibration = subject
    return generate_routed(model, tokenizer, prompt.text, max_tokens, named_rule.rule, calibration)


def failed_experiment(named_rule: NamedRule, prompt: Prompt, error: str) -> Experiment:
    """Return the row of an experiment that could not be finished."""
    record = ExperimentRecord(
        config_name=named_rule.name,
        prompt_text=prompt.text,
        prompt_category=prompt.category,
        prompt_description=prompt.description,
        status=STATUS_FAILED,
        error=error.encode(errors="backslashreplace").decode(),  # a file's name may be no UTF-8
    )
    return Experiment(record, ExperimentDetail())


def _summarise(
    generation: Generation, trace: ExpertTrace, config_name: str, prompt: Prompt, peak: int | None
) -> Experiment:
    counts_TL = trace.expert_counts.numpy()
    assignments_LE = trace.utilization.numpy()
    prefill = trace.forward_tokens[0]
    balance = load_balance(assignments_LE, counts_TL)
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
        expert_utilization_cv=balance.cv,
        expert_utilization_cv_noise=balance.cv_noise,
        expert_utilization_max_min_ratio=balance.max_min_ratio,
        expert_utilization_note=balance.note,
    )
    longest = int(counts_TL.max())
    detail = ExperimentDetail(
        output_token_ids=list(generation.token_ids),
        experts_by_layer=counts_TL.mean(axis=0).tolist(),
        count_histogram=[
            np.bincount(layer_T, minlength=longest + 1).tolist() for layer_T in counts_TL.T
        ],
        expert_counts=assignments_LE.tolist(),
        peak_memory_bytes=peak,
    )
    return Experiment(record, detail)
