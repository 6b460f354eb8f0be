"""Generate one sequence, timed: by the decode engine, or by transformers' `generate`."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from jinja2 import TemplateError
from torch import Tensor

from bh_routing.engine.decode import decode_greedily
from bh_routing.errors import InputError
from bh_routing.kernels.decode_layout import UndecodableError
from bh_routing.models.capture import evaluating
from bh_routing.models.routing import route
from bh_routing.models.trace import ExpertTrace
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Rule

ChatTemplateMode = Literal["auto", "on", "off"]


def choose_chat_template(tokenizer: Any, mode: ChatTemplateMode) -> Any:
    """Return the tokenizer, without its chat template if prompts are to stay as they are.

    Args:
        tokenizer: a model's; it isn't changed.
        mode: auto applies the template if there is one; on demands one; off leaves prompts raw.
    Raises:
        InputError: an unknown mode, or on where the tokenizer has no template.
    """
    if mode not in get_args(ChatTemplateMode):
        raise InputError(f"chat template must be auto, on or off; got {mode!r}")
    if mode == "on" and not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; choose auto or off")
    if mode == "off" and tokenizer.chat_template:
        tokenizer = copy.copy(tokenizer)
        tokenizer.chat_template = None
    return tokenizer


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the prompt's token ids, as a user's message if the tokenizer has a chat template.

    A template writes the beginning-of-text token itself; none is added to it.

    Raises:
        InputError: the template doesn't take a conversation of one message.
    """
    if not tokenizer.chat_template:
        raw: list[int] = tokenizer(prompt)["input_ids"]
        return raw
    message = [{"role": "user", "content": prompt}]
    try:
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"the tokenizer's chat template takes no single message ({error}); choose chat "
            "template off"
        ) from error
    return list(ids)


log = logging.getLogger(__name__)

GREEDY: Final = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "max_length": None,
}
"""What is asked of `generate`, whatever a checkpoint's own settings say."""
KNOWN_CRITERIA: Final = {"EosTokenCriteria", "MaxLengthCriteria"}
KNOWN_CACHES: Final = {"NoneType", "DynamicCache", "StaticCache"}
"""Those that keep the very keys and values."""


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
    has_nan: bool
    """Whether a token was chosen from logits that hold NaN or infinity."""


class RoutedGeneration(NamedTuple):
    """A continuation and what was kept for it."""

    generation: Generation
    trace: ExpertTrace


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
        tokenizer: its tokenizer; if it has a chat template, the prompt is a user's message in it.
        prompt: text, at least one token.
        max_new_tokens: most tokens to generate; an end-of-text token ends earlier.
        rule: which experts stay.
        calibration: what the rule's null needs.
    Raises:
        CalibrationError, ModelError, InputError: as `route` does.
    """
    token_1P = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    try:
        end_ids = _end_ids(model, token_1P, max_new_tokens)
        with evaluating(model):
            decoded = decode_greedily(
                model,
                token_1P,
                rule,
                calibration,
                max_new_tokens=max_new_tokens,
                end_ids=end_ids,
            )
    except UndecodableError as error:
        if (reason := str(error)) not in (told := _told.setdefault(model, set())):
            log.warning("texts are written by plain generate: %s", reason)
            told.add(reason)
        with route(model, rule, calibration) as trace:
            plain = generate_greedy(model, tokenizer, prompt, max_new_tokens)
        return RoutedGeneration(plain, trace)
    token_ids = decoded.token_SB[:, 0].tolist()
    generation = Generation(
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        token_ids=token_ids,
        num_input_tokens=token_1P.shape[1],
        inference_time_sec=decoded.prefill_sec + decoded.decode_sec,
        prefill_time_sec=decoded.prefill_sec,
        decode_time_sec=decoded.decode_sec,
        has_nan=decoded.has_nan,
    )
    return RoutedGeneration(generation, decoded.trace)


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
        tokenizer: its tokenizer; if it has a chat template, the prompt is a user's message in it.
        prompt: text, at least one token.
        max_new_tokens: most tokens to generate; an end-of-text token ends earlier.
    Returns:
        The continuation and its times in seconds. The clock is read when `generate` hands a
        token over, which it does after copying it to the host, so device work is included.
    """
    token_1P = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    num_input_tokens = token_1P.shape[1]
    pad = tokenizer.pad_token_id
    clock = TokenClock()
    start = time.perf_counter()
    with torch.inference_mode(), evaluating(model), _watch_logits(model) as tops:
        output = model.generate(
            input_ids=token_1P,
            attention_mask=torch.ones_like(token_1P),
            max_new_tokens=max_new_tokens,
            **GREEDY,
            tokenizer=tokenizer,
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
        has_nan=not all(bool(top < torch.inf) for top in tops),
    )


@contextmanager
def _watch_logits(model: Any) -> Iterator[list[Tensor]]:
    """Collect the largest logit of each forward call, which NaN is; no host sync."""
    tops: list[Tensor] = []

    def note(_: Any, __: Any, output: Any) -> None:
        tops.append(output.logits.amax())

    hook = model.register_forward_hook(note)
    try:
        yield tops
    finally:
        hook.remove()


def _end_ids(model: Any, token_1P: Tensor, max_new_tokens: int) -> set[int]:
    """Let `generate` prepare what it would do, and return the tokens that end it.

    Raises:
        UndecodableError: it would do more than take the largest logit.
    """
    end_ids: set[int] = set()
    # It hands no tokenizer on to a loop that isn't its own.
    unknown = {"stop_strings"} if model.generation_config.stop_strings else set()

    def inspect(
        _: Any,
        input_ids: Tensor,
        *,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: Any,
        past_key_values: Any = None,
        **__: Any,
    ) -> Tensor:
        unknown.update(
            {type(processor).__name__ for processor in logits_processor},
            {type(criterion).__name__ for criterion in stopping_criteria} - KNOWN_CRITERIA,
            {type(past_key_values).__name__} - KNOWN_CACHES,
            {str(generation_config.get_generation_mode().value)} - {"greedy_search"},
        )
        if not torch.equal(input_ids, token_1P):
            unknown.add("token_healing")
        for criterion in stopping_criteria:
            if (ends := getattr(criterion, "eos_token_id", None)) is not None:
                end_ids.update(ends.tolist())
        return input_ids

    try:
        model.generate(
            token_1P,
            attention_mask=torch.ones_like(token_1P),
            max_new_tokens=max_new_tokens,
            custom_generate=inspect,
            **GREEDY | {"stop_strings": None},
        )
    except (ValueError, ImportError) as error:
        raise UndecodableError(f"generate rejects its generation settings ({error})") from error
    if unknown:
        raise UndecodableError(f"its generation settings ask for {', '.join(sorted(unknown))}")
    return end_ids
