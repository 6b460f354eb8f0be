"""Turn a prompt into tokens: raw, or as a user's message in the tokenizer's chat template."""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from bh_routing.errors import InputError

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
