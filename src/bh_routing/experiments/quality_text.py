"""The text to score: tokenized documents and their division into windows and decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from bh_routing.engine.texts import Document, text_sha256
from bh_routing.engine.windows import (
    TokenizedDocument,
    check_decode_batch,
    check_windows,
    prefix_token,
    tokenize_documents,
)
from bh_routing.experiments.specs import ScoredSpec
from bh_routing.models.routers import ModelFacts

DEFAULT_WINDOW = 1024
STEP_TOKENS: Final = 8192
"""Most tokens of the sequences of emulated decode steps, whose logits are in memory at a time."""
DRAWS: Final = 2
"""Draws of step companions: each document is scored in as many different batches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityText:
    """Tokenized text and its windows; a record depends on these and on its rule only."""

    documents: Sequence[TokenizedDocument]
    sha256: str
    max_tokens: int | None
    window: int
    stride: int
    batch_size: int | None = None
    """Windows per forward pass, without effect on records; None: as many as memory bounds allow."""
    decode_batch: int | None = None
    """Sequences per emulated decode step; None: no steps."""

    @property
    def num_documents(self) -> int:
        """Number of documents, each counted once however often its step companions are drawn."""
        return sum(document.draw == 0 for document in self.documents)


def prepare_text(
    tokenizer: Any,
    facts: ModelFacts,
    documents: Sequence[Document],
    *,
    max_tokens: int | None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    decode_batch: int | None = None,
) -> QualityText:
    """Tokenize documents for scoring.

    For emulated decode steps every document is there DRAWS times: each time it is scored in steps
    with other companions. The records of a document's draws belong to one cluster, so a bootstrap
    over clusters draws companions with the documents.

    Args:
        tokenizer: the model's tokenizer.
        facts: the model's properties, for its context.
        documents: texts.
        max_tokens: total number of scored tokens, spread over the documents; None: all.
        window: input tokens per forward pass; None: the model's context, 1,024 at most, and in
            emulated decode steps no more than STEP_TOKENS in all sequences together.
        stride: scored tokens of each window after the first; None: the window, so disjoint.
        batch_size: windows per forward pass, as in `QualityText`; unused in emulated steps.
        decode_batch: sequences per emulated decode step; None: no steps.
    Raises:
        InputError: there is nothing to score, window and stride don't fit the model, there are
            fewer documents than sequences in a step, or the tokenizer has no token that can start
            a document.
    """
    prefix_token(tokenizer)
    if window is None:
        window = min(DEFAULT_WINDOW, facts.context_length or DEFAULT_WINDOW)
        if decode_batch is not None:
            window = min(window, max(1, STEP_TOKENS // decode_batch))
    stride = window if stride is None else stride
    check_windows(window, stride, facts.context_length)
    tokenized = tokenize_documents(tokenizer, documents, max_tokens)
    if decode_batch is not None:
        check_decode_batch(tokenized, decode_batch)
        tokenized = [_in_draw(d, draw) for draw in range(DRAWS) for d in tokenized]
    return QualityText(
        documents=tokenized,
        sha256=text_sha256([document.text for document in documents]),
        max_tokens=max_tokens,
        window=window,
        stride=stride,
        batch_size=batch_size,
        decode_batch=decode_batch,
    )


def scored_text(
    spec: ScoredSpec, documents: Sequence[Document], tokenizer: Any, facts: ModelFacts
) -> QualityText:
    """Tokenize documents for scoring in a spec's windows or steps."""
    fields = spec.model_dump(include={"window", "stride", "batch_size", "decode_batch"})
    return prepare_text(tokenizer, facts, documents, max_tokens=spec.tokens, **fields)


def _in_draw(document: TokenizedDocument, draw: int) -> TokenizedDocument:
    return replace(document, key=f"{document.key}#{draw}", draw=draw) if draw else document
