"""Make the three local lm-eval tasks from the demo's held-out evaluation text.

    python tools/make_lm_eval_tasks.py

Cloze: predict the last word of a passage of prose; the word occurs earlier in the passage, so that
context can help. Choice: select the true continuation among four; the others continue passages of
other documents of the same domain. Perplexity: the beginning of every document.

Passages are drawn evenly over documents. Draws are ordered by a hash, so the files are identical on
every platform and version of Python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

from bh_routing.engine.texts import Document, packaged_documents, read_documents
from bh_routing.integrations.lm_eval import CHOICE_FILE, CLOZE_FILE, ROLLING_FILE, task_folder

SEED = 0
ITEMS = 200
CLOZE_WORDS = range(35, 71)
"""Words of a cloze passage, including the last one."""
CONTEXT_WORDS = range(25, 51)
CONTINUATION_WORDS = 12
SHORTEST_TARGET = 4
"""Letters of a cloze target: shorter words are mostly function words."""
EXCERPT_CHARACTERS = 2000
NUM_CHOICES = 4

_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
_PROSE = re.compile(r"""[A-Za-z0-9 ,.;:'"!?()\-“”‘’—–]+""")

Row = dict[str, object]
Item = TypeVar("Item")


class Passage(NamedTuple):
    """Consecutive sentences and their source."""

    cluster: str
    domain: str
    sentences: list[str]


class Split(NamedTuple):
    """A context and the words that follow it."""

    cluster: str
    domain: str
    context: str
    continuation: str


def main() -> int:
    """Write the three files and print their numbers of items and bytes."""
    parser = argparse.ArgumentParser(description="Make the three local lm-eval tasks.")
    parser.add_argument("--text", type=Path, help="default: the demo's evaluation text")
    parser.add_argument("--output", type=Path, default=task_folder())
    arguments = parser.parse_args()
    text = arguments.text
    documents = packaged_documents("evaluation") if text is None else read_documents([text])
    for name, rows in make_tasks(documents).items():
        path = arguments.output / name
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), "utf-8")
        print(f"{path.name}: {len(rows)} items, {path.stat().st_size} bytes", file=sys.stderr)
    return 0


def make_tasks(documents: Sequence[Document]) -> dict[str, list[Row]]:
    """Return file name -> rows of the three tasks."""
    passages = [list(_prose_passages(document)) for document in documents]
    return {
        CLOZE_FILE: _draw([list(_cloze_rows(rows)) for rows in passages], ITEMS),
        CHOICE_FILE: _choice_rows(passages),
        ROLLING_FILE: [
            {"cluster": d.cluster, "domain": d.domain, "text": _excerpt(d.text)} for d in documents
        ],
    }


def _draw(items_by_document: Iterable[list[Item]], count: int) -> list[Item]:
    """Take one item per document in turn, in hashed order, up to `count`."""
    shuffled = [_shuffled(items) for items in items_by_document]
    rounds = [_shuffled([item for item in turn if item]) for turn in zip_longest(*shuffled)]
    return [item for turn in rounds for item in turn][:count]


def _shuffled(items: Iterable[Item], salt: str = "") -> list[Item]:
    """Order by hash; independent draws take different salts."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{SEED} {salt} {item}".encode()).digest())


def _prose_passages(document: Document) -> Iterator[Passage]:
    """Yield runs of paragraphs of prose, without code, tables, lists and headings."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", document.text)]
    for is_prose, run in groupby(paragraphs, key=_is_prose):
        if is_prose:
            yield Passage(document.cluster, document.domain, _SENTENCE_END.split(" ".join(run)))


def _is_prose(paragraph: str) -> bool:
    is_list = paragraph.startswith("- ")
    is_closed = paragraph.endswith((".", "!", "?"))
    return is_closed and not is_list and _PROSE.fullmatch(paragraph) is not None


def _cloze_rows(passages: list[Passage]) -> Iterator[Row]:
    """Yield rows from runs of sentences that don't overlap."""
    for passage in passages:
        start = 0
        while start < len(passage.sentences):
            row, start = _first_cloze_row(passage, start)
            if row:
                yield row


def _first_cloze_row(passage: Passage, start: int) -> tuple[Row | None, int]:
    """Return the longest run from `start` that fits, and the index of the next sentence."""
    # A sentence has at least one word.
    longest = min(len(passage.sentences), start + CLOZE_WORDS.stop)
    for end in range(longest, start, -1):
        row = _cloze_row(passage, " ".join(passage.sentences[start:end]))
        if row:
            return row, end
    return None, start + 1


def _cloze_row(passage: Passage, text: str) -> Row | None:
    context, _, last = text.rpartition(" ")
    target = last.rstrip(".!?")
    if len(text.split()) not in CLOZE_WORDS or len(target) < SHORTEST_TARGET:
        return None
    if not re.fullmatch("[A-Za-z]+", target) or target not in re.findall("[A-Za-z]+", context):
        return None
    return {
        "cluster": passage.cluster,
        "domain": passage.domain,
        "context": context,
        "target": target,
    }


def _choice_rows(passages: Iterable[list[Passage]]) -> list[Row]:
    """Draw splits; the distractors of each come from other documents of its domain."""
    splits = [[split for passage in rows for split in _splits(passage)] for rows in passages]
    every = [split for rows in splits for split in rows]
    return [_choice_row(split, every) for split in _draw(splits, ITEMS)]


def _choice_row(split: Split, every: Sequence[Split]) -> Row:
    others = [
        other.continuation
        for other in every
        if other.domain == split.domain and other.cluster != split.cluster
    ]
    distractors = _shuffled(others, f"others of {split}")[: NUM_CHOICES - 1]
    choices = _shuffled([split.continuation, *distractors], "order")
    return {
        "cluster": split.cluster,
        "domain": split.domain,
        "context": split.context,
        "choices": choices,
        "answer": choices.index(split.continuation),
    }


def _splits(passage: Passage) -> Iterator[Split]:
    """Yield contexts of whole sentences that don't overlap, each followed by equally many words."""
    start = 0
    for end in range(1, len(passage.sentences)):
        context = " ".join(passage.sentences[start:end])
        rest = " ".join(passage.sentences[end : end + CONTINUATION_WORDS]).split()
        if len(context.split()) in CONTEXT_WORDS and len(rest) >= CONTINUATION_WORDS:
            continuation = " ".join(rest[:CONTINUATION_WORDS])
            yield Split(passage.cluster, passage.domain, context, continuation)
        if len(context.split()) >= CONTEXT_WORDS.start:
            start = end


def _excerpt(text: str) -> str:
    """Return the beginning, cut after a paragraph."""
    if len(text) <= EXCERPT_CHARACTERS:
        return text
    beginning, _, _ = text[:EXCERPT_CHARACTERS].rpartition("\n\n")
    return beginning or text[:EXCERPT_CHARACTERS]


if __name__ == "__main__":
    sys.exit(main())
