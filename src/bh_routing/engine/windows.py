"""Cut documents into windows of tokens, with the scored tokens of each."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
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
    draw: int = 0
    """Number of the draw of step companions; documents of different draws share no step."""


@dataclass(frozen=True, slots=True)
class Window:
    """Inputs `ids[:-1]`, targets `ids[1:]`; targets from `first_scored` on are scored."""

    document: int
    ids: list[int]
    first_scored: int

    @property
    def num_scored(self) -> int:
        """Number of scored targets."""
        return len(self.ids) - 1 - self.first_scored

    def as_companion(self) -> Window:
        """Return the window with no token scored."""
        return replace(self, first_scored=len(self.ids) - 1)


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


def plan_steps(
    windows: Sequence[Window], clusters: Sequence[str], decode_batch: int, seed: int
) -> Iterator[list[Window]]:
    """Arrange windows in batches whose position t forms emulated decode step t.

    As in a server with `decode_batch` places, each place takes the windows of one document after
    the other, then those of the next document in a seeded random order, in which documents with
    more windows come first. Documents of a batch differ, and as far as possible their clusters do.
    Once no document is left, random windows of other documents join as companions, with no token
    scored, so that every batch is full.

    Args:
        windows: windows of at least `decode_batch` documents.
        clusters: the cluster of each document.
        decode_batch: sequences per batch.
        seed: seed of the order and of the companions.
    Yields:
        Batches; every window is in exactly one, except as a companion.
    """
    draw = random.Random(seed)
    waiting: dict[int, list[Window]] = {}
    for window in windows:
        waiting.setdefault(window.document, []).append(window)
    all_windows = {document: list(own) for document, own in waiting.items()}
    queue = sorted(waiting, key=lambda document: (-len(waiting[document]), draw.random()))
    places: list[int] = []
    while True:
        places = [document for document in places if waiting[document]]
        while queue and len(places) < decode_batch:
            places.append(queue.pop(_first_of_another(queue, places, clusters)))
        if not places:
            return
        batch = [waiting[document].pop(0) for document in places]
        others = sorted(all_windows.keys() - set(places))
        for document in draw.sample(others, decode_batch - len(batch)):
            batch.append(draw.choice(all_windows[document]).as_companion())
        yield batch


def check_decode_batch(documents: Sequence[TokenizedDocument], decode_batch: int) -> None:
    """Raise InputError unless each draw has as many documents as a decode step has sequences."""
    fewest = min(Counter(document.draw for document in documents).values())
    if not 1 <= decode_batch <= fewest:
        raise InputError(
            f"decode_batch must be from 1 to the number of documents, {fewest}, because the "
            f"sequences of a step are of different documents, got {decode_batch}; give more "
            "documents or a smaller batch"
        )


def _first_of_another(queue: Sequence[int], places: Sequence[int], clusters: Sequence[str]) -> int:
    """Return the index of the first document whose cluster has no place; 0 if all have one."""
    taken = {clusters[document] for document in places}
    return next((i for i, document in enumerate(queue) if clusters[document] not in taken), 0)


def check_windows(window: int, stride: int, context: int | None) -> None:
    """Raise InputError unless 1 <= stride <= window <= the model's context."""
    if context is not None and not 1 <= window <= context:
        raise InputError(f"window must be from 1 to the model's context {context}, got {window}")
    if not 1 <= stride <= window:
        raise InputError(f"stride must be from 1 to the window {window}, got {stride}")


def cut_pieces(documents: Sequence[TokenizedDocument], longest: int) -> Iterator[TokenizedDocument]:
    """Cut each document into pieces of nearly equal length, at most `longest` tokens."""
    for document in documents:
        number = -(-len(document.ids) // longest)
        ends = [len(document.ids) * i // number for i in range(number + 1)]
        for start, end in pairwise(ends):
            yield replace(
                document,
                key=f"{document.key}+{start}",
                name=f"{document.name}+{start}",
                ids=document.ids[start:end],
            )


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
