"""Cut documents into windows of tokens, with the scored tokens of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bh_routing.engine.texts import Document
from bh_routing.errors import InputError

CHAPTER_TOKENS = 4096
"""Longer documents are cut into chapters of this length, with the book as their cluster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedDocument:
    """A document or chapter as token ids, without a prefix token."""

    key: str
    """Identifier: hash of the document's text and index of the first token."""
    name: str
    """For display; unique among documents tokenized together."""
    cluster: str
    domain: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Window:
    """Inputs `ids[:-1]`, targets `ids[1:]`; targets from `first_scored` on are scored."""

    document: int
    ids: list[int]
    first_scored: int


def prefix_token(tokenizer: Any) -> int:
    """Return the token prepended to documents: beginning-of-text, else end-of-text.

    As in lm-evaluation-harness; it allows a document's first token to be scored.

    Raises:
        InputError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError(
        "the tokenizer has neither a beginning- nor an end-of-text token, so a document's first "
        "token can't be scored; set tokenizer.eos_token"
    )


def tokenize_documents(
    tokenizer: Any, documents: Sequence[Document], max_tokens: int | None
) -> list[TokenizedDocument]:
    """Tokenize documents, spread a budget of scored tokens over them, and cut them into chapters.

    Args:
        tokenizer: the model's tokenizer; no special token is added.
        documents: texts with their names, clusters and domains.
        max_tokens: total number of scored tokens, spread as evenly as the documents' lengths
            allow, from the start of each document; None for all.
    Returns:
        Documents of at most CHAPTER_TOKENS tokens; chapters keep their book's cluster. Repeated
        names are numbered.
    Raises:
        InputError: there is no token to score.
    """
    all_ids = [
        tokenizer(d.text, add_special_tokens=False, verbose=False)["input_ids"] for d in documents
    ]
    lengths = [len(ids) for ids in all_ids]
    if max_tokens is not None:
        lengths = spread_tokens(lengths, max_tokens)
    pieces: list[TokenizedDocument] = []
    names: set[str] = set()
    for document, ids, length in zip(documents, all_ids, lengths, strict=True):
        starts = range(0, length, CHAPTER_TOKENS)
        for chapter, start in enumerate(starts):
            name = document.name if len(starts) == 1 else f"{document.name}.{chapter}"
            pieces.append(
                TokenizedDocument(
                    key=f"{document.key}:{start}",
                    name=_unlike(name, names),
                    cluster=document.cluster,
                    domain=document.domain,
                    ids=ids[start : min(start + CHAPTER_TOKENS, length)],
                )
            )
            names.add(pieces[-1].name)
    if not pieces:
        raise InputError("the evaluation text has no token to score; give longer documents")
    return pieces


def _unlike(name: str, names: set[str]) -> str:
    """Return the name, numbered if it is among `names`."""
    candidate, number = name, 1
    while candidate in names:
        number += 1
        candidate = f"{name}#{number}"
    return candidate


def cut_windows(
    documents: Sequence[TokenizedDocument], prefix: int, window: int, stride: int
) -> Iterator[Window]:
    """Cut each document, after the prefix token, into windows of at most `window` inputs.

    Each target is scored exactly once. With `stride` = `window` the scored parts are disjoint;
    with a smaller stride every window after the first scores `stride` targets after
    `window - stride` tokens of context. As in lm-evaluation-harness, the last window is shifted
    back until it is full, so its targets have as much context as possible.

    Example:
        >>> ids = [1, 2, 3, 4, 5]
        >>> document = TokenizedDocument(key="a:0", name="a", cluster="a", domain="x", ids=ids)
        >>> [(w.ids, w.first_scored) for w in cut_windows([document], 0, window=4, stride=2)]
        [([0, 1, 2, 3, 4], 0), ([1, 2, 3, 4, 5], 3)]
    """
    for number, document in enumerate(documents):
        ids = [prefix, *document.ids]
        scored = 0  # targets scored so far; target t is ids[t + 1]
        while scored < len(document.ids):
            end = min(scored + (stride if scored else window), len(document.ids))
            start = max(0, end - window)
            yield Window(number, ids[start : end + 1], scored - start)
            scored = end


def check_windows(window: int, stride: int, context: int | None) -> None:
    """Raise InputError unless 1 <= stride <= window <= the model's context."""
    if context is not None and not 1 <= window <= context:
        raise InputError(f"window must be from 1 to the model's context {context}, got {window}")
    if not 1 <= stride <= window:
        raise InputError(f"stride must be from 1 to the window {window}, got {stride}")


def spread_tokens(lengths: Sequence[int], budget: int) -> list[int]:
    """Spread a budget of tokens as evenly as the documents' lengths allow.

    Example:
        >>> spread_tokens([10, 100, 100], budget=110)
        [10, 50, 50]
    """
    level, left, waiting = 0, budget, sorted(lengths)
    while waiting and left >= len(waiting):
        step = min(waiting[0] - level, left // len(waiting))
        level += step
        left -= step * len(waiting)
        waiting = [length for length in waiting if length > level]
        if step == 0 and waiting:
            break
    return [min(length, level) for length in lengths]
