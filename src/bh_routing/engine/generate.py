"""Greedy generation by transformers' own `generate`, with the clock read at each token."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Generation(NamedTuple):
    """One greedy continuation and how long it took."""

    text: str
    token_ids: list[int]
    """Generated ids alone, an end-of-text token included."""
    num_input_tokens: int
    inference_time_sec: float
    prefill_time_sec: float
    """Until the first token was known."""
    decode_time_sec: float


class _Clock:
    """A streamer: `generate` hands it the prompt, then each token as soon as it is on the host."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, _: Tensor) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        pass


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
    clock = _Clock()
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
