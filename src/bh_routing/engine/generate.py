"""Timed generation, by the decode engine or by transformers' `generate`."""

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
    """Return the tokenizer with its chat template, or a copy without it for raw prompts.

    Args:
        tokenizer: a model's tokenizer; it isn't changed.
        mode: "auto" applies the template if there is one, "on" requires one, "off" removes it.
    Raises:
        InputError: the mode is unknown, or it is "on" and the tokenizer has no template.
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
    """Return the prompt's token ids, as a user message if the tokenizer has a chat template.

    A template includes the beginning-of-text token itself; none is added.

    Raises:
        InputError: the template doesn't accept a single user message.
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
"""Arguments of `generate` that override a checkpoint's own settings."""
KNOWN_CRITERIA: Final = {"EosTokenCriteria", "MaxLengthCriteria"}
KNOWN_CACHES: Final = {"NoneType", "DynamicCache", "StaticCache"}
"""Caches that store keys and values unchanged."""


_told: Final[WeakKeyDictionary[Any, set[str]]] = WeakKeyDictionary()
"""Reasons for plain `generate`, already logged, by model."""


class Generation(NamedTuple):
    """One greedy continuation, and the times of its batch."""

    text: str
    token_ids: list[int]
    """Generated ids only, including an end-of-text token."""
    num_input_tokens: int
    inference_time_sec: float
    """Prefill and decode, without compiling, capturing and tokenizing."""
    prefill_time_sec: float
    """Until the first token is on the host."""
    decode_time_sec: float
    has_nan: bool
    """Whether a token was chosen from logits that hold NaN or infinity."""


class RoutedGeneration(NamedTuple):
    """A continuation and the trace of its kept experts."""

    generation: Generation
    trace: ExpertTrace

    @property
    def text(self) -> str:
        """The continuation alone."""
        return self.generation.text

    @property
    def expert_counts(self) -> Tensor:
        """Experts per token: int64 on the host, (tokens, layers), the prompt's tokens first."""
        return self.trace.expert_counts


def generate_routed(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    rule: Rule,
    calibration: Calibration | None = None,
) -> RoutedGeneration:
    """Continue one prompt as `generate_batch` does."""
    return generate_batch(model, tokenizer, [prompt], max_new_tokens, rule, calibration)[0]


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    rule: Rule,
    calibration: Calibration | None = None,
) -> list[RoutedGeneration]:
    """Continue prompts together, greedily, under a rule, by the decode engine if it supports it.

    Otherwise `generate` runs under `route`, and the reason is logged once.

    Args:
        model: a transformers model with `generate`, not inside `route`.
        tokenizer: its tokenizer; with a chat template, a prompt becomes a user message.
        prompts: texts of at least one token.
        max_new_tokens: maximum number of generated tokens; an end-of-text token ends earlier.
        rule: decides which slots stay.
        calibration: reference distributions, if the rule's null needs a table.
    Raises:
        CalibrationError, ModelError, InputError: as in `route`.
    """
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    try:
        end_ids = _end_ids(model, prompt_ids, max_new_tokens)
        with evaluating(model):
            decoded = decode_greedily(
                model,
                prompt_ids,
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
            plain = _generate_plain(model, tokenizer, prompt_ids, max_new_tokens)
        return list(map(RoutedGeneration, plain, _traces_of(trace, plain)))
    generations = [
        Generation(
            text=tokenizer.decode(token_ids, skip_special_tokens=True),
            token_ids=token_ids,
            num_input_tokens=len(prompt),
            inference_time_sec=decoded.prefill_sec + decoded.decode_sec,
            prefill_time_sec=decoded.prefill_sec,
            decode_time_sec=decoded.decode_sec,
            has_nan=decoded.has_nan,
        )
        for prompt, token_ids in zip(prompt_ids, decoded.token_ids, strict=True)
    ]
    return list(map(RoutedGeneration, generations, decoded.traces))


def _traces_of(trace: ExpertTrace, generations: Sequence[Generation]) -> list[ExpertTrace]:
    """Split the trace of a batch's prefill and decode steps into one for each sequence."""
    if len(generations) == 1:
        return [trace]
    lengths = [generation.num_input_tokens for generation in generations]
    prompts, steps_TLK = trace.kept_index.tensor_split([sum(lengths)])
    steps_SBLK = steps_TLK.unflatten(0, (-1, len(lengths)))
    return [
        ExpertTrace.of_sequence(
            torch.cat([prompt_TLK, steps_SBLK[: len(generation.token_ids) - 1, row]]),
            len(prompt_TLK),
            trace.num_experts,
        )
        for row, (prompt_TLK, generation) in enumerate(
            zip(prompts.split(lengths), generations, strict=True)
        )
    ]


class TokenClock:
    """A streamer: `generate` passes it the prompt, then each token once it is on the host."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def put(self, _: Tensor) -> None:
        """Record the time."""
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token is already recorded."""


def generate_greedy(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> Generation:
    """Continue `prompt` greedily, exactly as plain `model.generate(do_sample=False)` does.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer; with a chat template, the prompt becomes a user message.
        prompt: text, at least one token.
        max_new_tokens: maximum number of generated tokens; an end-of-text token ends earlier.
    Returns:
        The continuation and its times in seconds. The clock is read when `generate` streams a
        token, after copying it to the host, so device work is included.
    """
    prompt_ids = [encode_prompt(tokenizer, prompt)]
    return _generate_plain(model, tokenizer, prompt_ids, max_new_tokens)[0]


def _generate_plain(
    model: Any, tokenizer: Any, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Generation]:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompt_ids))
    # Padding comes first, so that all sequences continue at the same position.
    padded = [[pad if pad is not None else 0] * (longest - len(ids)) + [*ids] for ids in prompt_ids]
    lengths_B = torch.tensor([len(ids) for ids in prompt_ids])
    is_real_BP = torch.arange(longest) >= longest - lengths_B[:, None]
    clock = TokenClock()
    start = time.perf_counter()
    with torch.inference_mode(), evaluating(model), _watch_logits(model) as tops:
        output = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=is_real_BP.long().to(model.device),
            max_new_tokens=max_new_tokens,
            **GREEDY,
            tokenizer=tokenizer,
            pad_token_id=pad,
            streamer=clock,
        )
    rows = output[:, longest:].tolist()
    end = time.perf_counter()
    first_token, has_nan = clock.ticks[1], not all(bool(top < torch.inf) for top in tops)
    token_ids = rows if len(rows) == 1 else [_until_end(model, row, pad) for row in rows]
    return [
        Generation(
            text=tokenizer.decode(ids, skip_special_tokens=True),
            token_ids=ids,
            num_input_tokens=len(prompt),
            inference_time_sec=end - start,
            prefill_time_sec=first_token - start,
            decode_time_sec=end - first_token,
            has_nan=has_nan,
        )
        for prompt, ids in zip(prompt_ids, token_ids, strict=True)
    ]


def _until_end(model: Any, token_ids: list[int], pad: int) -> list[int]:
    """Remove the padding that follows a sequence which ended before others of its batch."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    count = next((n for n, token in enumerate(token_ids, 1) if token in ends), len(token_ids))
    while count > 1 and token_ids[count - 1] == pad and pad not in ends:
        count -= 1
    return token_ids[:count]


@contextmanager
def _watch_logits(model: Any) -> Iterator[list[Tensor]]:
    """Collect the largest logit of each forward call, NaN if any is; no host sync."""
    tops: list[Tensor] = []

    def note(_: Any, __: Any, output: Any) -> None:
        tops.append(output.logits.amax())

    hook = model.register_forward_hook(note)
    try:
        yield tops
    finally:
        hook.remove()


def _end_ids(model: Any, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> set[int]:
    """Return the end-of-text tokens of `generate`, from a dry run of its preparation per prompt.

    Raises:
        UndecodableError: its settings ask for more than greedy search.
    """
    end_ids: set[int] = set()
    # `generate` doesn't pass its tokenizer to a custom loop.
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
        if input_ids.tolist() not in [[ids] for ids in prompt_ids]:
            unknown.add("token_healing")
        for criterion in stopping_criteria:
            if (ends := getattr(criterion, "eos_token_id", None)) is not None:
                end_ids.update(ends.tolist())
        return input_ids

    try:
        for ids in prompt_ids:
            token_1P = torch.tensor([ids], device=model.device)
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
