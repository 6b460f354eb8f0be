"""Greedy generation of one text, timed: by the decode engine, or by transformers' `generate`."""

from __future__ import annotations

import logging
import time
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bh_routing.engine.decode import decode_greedily
from bh_routing.kernels.decode_layout import UndecodableError
from bh_routing.models.routing import route
from bh_routing.models.trace import ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Rule

log = logging.getLogger(__name__)

LOGITS_SETTINGS: Final = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": None,
    "guidance_scale": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
}
"""Settings of a checkpoint that change logits before the largest is taken -> what does nothing."""


_told: Final[WeakKeyDictionary[Any, set[str]]] = WeakKeyDictionary()
"""Why plain `generate` writes a model's texts, as the log says already."""


class Generation(NamedTuple):
    """One greedy continuation and how long it took."""

    text: str
    token_ids: list[int]
    """Generated ids alone, an end-of-text token included."""
    num_input_tokens: int
    inference_time_sec: float
    """Prefill and decode; compiling, capturing and tokenizing aren't part of it."""
    prefill_time_sec: float
    """Until the first token was known."""
    decode_time_sec: float


class RoutedGeneration(NamedTuple):
    """A continuation and what was kept for it."""

    generation: Generation
    trace: ExpertTrace
    has_nan: bool
    """Whether the engine's last logits were NaN: from the first NaN on they all are."""


def generate_routed(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    rule: Rule,
    calibration: Calibration | None = None,
) -> RoutedGeneration:
    """Continue `prompt` greedily under a rule, by the decode engine where there is one.

    Otherwise `generate` runs under `route`, and one line of the log says why.

    Args:
        model: a transformers model with `generate`, not inside `route`.
        tokenizer: its tokenizer.
        prompt: text, at least one token.
        max_new_tokens: most tokens to generate; an end-of-text token ends earlier.
        rule: which experts stay.
        calibration: what the rule's null needs.
    Raises:
        CalibrationError, ModelError, InputError: as `route` does.
    """
    token_1P = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    try:
        _refuse_logits_settings(model)
        decoded = decode_greedily(
            model,
            token_1P,
            rule,
            calibration,
            max_new_tokens=max_new_tokens,
            end_ids=_end_ids(model),
        )
    except UndecodableError as error:
        if (reason := str(error)) not in (told := _told.setdefault(model, set())):
            log.warning("texts are written by plain generate: %s", reason)
            told.add(reason)
        with route(model, rule, calibration) as trace:
            plain = generate_greedy(model, tokenizer, prompt, max_new_tokens)
        return RoutedGeneration(plain, trace, has_nan=False)
    token_ids = decoded.token_SB[:, 0].tolist()
    generation = Generation(
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        token_ids=token_ids,
        num_input_tokens=token_1P.shape[1],
        inference_time_sec=decoded.prefill_sec + decoded.decode_sec,
        prefill_time_sec=decoded.prefill_sec,
        decode_time_sec=decoded.decode_sec,
    )
    return RoutedGeneration(generation, decoded.trace, decoded.has_nan)


class TokenClock:
    """A streamer: `generate` hands it the prompt, then each token as soon as it is on the host."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, _: Tensor) -> None:
        """Note the time."""
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token was noted."""


def generate_greedy(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> Generation:
    """Continue `prompt` greedily, exactly as plain `model.generate(do_sample=False)` does.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
        prompt: text, at least one token.
        max_new_tokens: most tokens to generate; an end-of-text token ends earlier.
    Returns:
        The continuation and its times in seconds. The clock is read when `generate` hands a
        token over, which it does after copying it to the host, so device work is included.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    num_input_tokens = inputs["input_ids"].shape[1]
    pad = tokenizer.pad_token_id
    clock = TokenClock()
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            streamer=clock,
        )
    token_ids = output[0, num_input_tokens:].tolist()
    end = time.perf_counter()
    first_token = clock.ticks[1]
    return Generation(
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        token_ids=token_ids,
        num_input_tokens=num_input_tokens,
        inference_time_sec=end - start,
        prefill_time_sec=first_token - start,
        decode_time_sec=end - first_token,
    )


def _refuse_logits_settings(model: Any) -> None:
    settings = model.generation_config
    for name, nothing in LOGITS_SETTINGS.items():
        value = getattr(settings, name, nothing)
        if value is not None and value != nothing:
            raise UndecodableError(f"its generation settings say {name}={value!r}")


def _end_ids(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}
