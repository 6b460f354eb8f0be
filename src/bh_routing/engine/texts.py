"""Read documents from plain text, xz-compressed text, JSON lines or Hugging Face datasets."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import lzma
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bh_routing.demo import CALIBRATION_TEXT, EVALUATION_TEXT, demo_folder
from bh_routing.errors import InputError

SEPARATOR = "<|endoftext|>"
DATASET_PREFIX = "hf:"
PASSAGE_WORDS: Final = 24
"""Consecutive words that texts don't share by chance: the packaged texts share 12, never 16."""
PASSAGE_STRIDE: Final = 9
"""At least one of this many consecutive passages is kept: any 32 common words are recognised."""
# In scripts without spaces each letter counts as a word: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED: Final = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD: Final = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_SEPARATOR_LINE: Final = re.compile(rf"^[ \t]*{re.escape(SEPARATOR)}[ \t]*$", re.MULTILINE)
_MARKS: Final = (
    (codecs.BOM_UTF8, "UTF-8-sig"),
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

log = logging.getLogger(__name__)


class Document(NamedTuple):
    """A text with its name, cluster and domain."""

    name: str
    """For display; several documents may have the same name."""
    text: str
    cluster: str
    """Documents of one cluster, such as chapters of a book, aren't independent draws."""
    domain: str

    @property
    def key(self) -> str:
        """SHA-256 of the text, which identifies the document."""
        return _key(self.text)


def read_documents(sources: Iterable[str | Path]) -> list[Document]:
    """Read all documents of files or datasets.

    `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT` is a dataset on the Hugging Face hub, or a folder
    that `datasets.load_dataset` reads, with a column `text`. A `.jsonl` file has one object per
    line with `text` and, optionally, `name`, `cluster` and `domain`. Any other file is text,
    optionally `.xz` compressed, with lines of only `<|endoftext|>` between documents; a
    `documents.json` next to it may label them. Files are UTF-8, or UTF-16 or UTF-32 with a byte
    order mark; Windows and old Mac line ends are supported.

    Documents are identified by their text, not their name: duplicate texts count once. Without a
    `cluster`, each document is its own cluster.

    Raises:
        InputError: a file is missing, has another encoding, or holds no text.
    """
    documents = []
    for source in sources:
        if str(source).startswith(DATASET_PREFIX):
            documents += _read_dataset(str(source))
        else:
            documents += _read_file(Path(source))
    if not documents:
        raise InputError("no text file was given; give at least one")
    return _distinct(documents)


def as_documents(texts: Sequence[str | Document]) -> list[Document]:
    """Return texts as documents; each is a cluster by itself, and one given twice counts once.

    Raises:
        InputError: something else than a list of texts and documents.
    Example:
        >>> [document.name for document in as_documents(["One text.", "Another text."])]
        ['text-1', 'text-2']
    """
    if isinstance(texts, str | Document):
        raise InputError("texts must be a list of texts or documents, got one text; write [text]")
    documents = []
    for number, text in enumerate(texts, start=1):
        if isinstance(text, str):
            text = Document(f"text-{number}", text, _key(text), "text")
        if not isinstance(text, Document):
            raise InputError(
                f"text {number} must be a string or a Document, got {type(text).__name__}; "
                "read_documents of bh_routing.engine reads files"
            )
        documents.append(text)
    return _distinct(documents)


def packaged_documents(split: str) -> list[Document]:
    """Return the demo's own `calibration` or `evaluation` documents."""
    files = {"calibration": CALIBRATION_TEXT, "evaluation": EVALUATION_TEXT}
    return read_documents([demo_folder() / files[split]])


def text_sha256(texts: Sequence[str]) -> str:
    """Hash texts in order, to compare two sets of texts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(bytes.fromhex(_key(text)))
    return digest.hexdigest()


def passage_hashes(texts: Iterable[str]) -> NDArray[np.int64]:
    """Hash enough passages of texts to recognise any part of 32 words.

    A passage is PASSAGE_WORDS consecutive words, or a whole shorter text; case, punctuation and
    white space are ignored. Of every PASSAGE_STRIDE consecutive passages the smallest hash is kept.

    Returns:
        Distinct hashes, ascending, about one per five words.
    Source: winnowing, Schleimer, Wilkerson & Aiken (2003).
    """
    kept = [np.empty(0, dtype=np.int64)]
    for text in texts:
        hashes_P = _hash_passages(_WORD.findall(text.casefold()))
        if hashes_P.size:
            stride = min(PASSAGE_STRIDE, hashes_P.size)
            kept.append(np.lib.stride_tricks.sliding_window_view(hashes_P, stride).min(axis=-1))
    return np.unique(np.concatenate(kept))


def find_shared_passages(
    documents: Iterable[Document], known: NDArray[np.int64]
) -> list[tuple[str, list[str]]]:
    """Find the documents that share a passage with `passage_hashes` of other texts.

    Returns:
        Each such document's name and the words of its first shared passage.
    """
    shared = []
    for document in documents:
        words = _WORD.findall(document.text.casefold())
        (found,) = np.nonzero(np.isin(_hash_passages(words), known))
        if found.size:
            shared.append((document.name, words[found[0] : found[0] + PASSAGE_WORDS]))
    return shared


def _hash_passages(words: Sequence[str]) -> NDArray[np.int64]:
    """Return one hash per passage; axis P."""
    if not words:
        return np.empty(0, dtype=np.int64)
    by_word = {
        word: int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        for word in set(words)
    }
    words_W = np.array([by_word[word] for word in words], dtype=np.uint64)
    length = min(PASSAGE_WORDS, len(words))
    hashes_P = np.zeros(len(words) - length + 1, dtype=np.uint64)
    for offset in range(length):  # a polynomial modulo 2^64, over all passages at once
        hashes_P = hashes_P * np.uint64(0x9E3779B97F4A7C15)
        hashes_P += words_W[offset : offset + hashes_P.size]
    return hashes_P.view(np.int64)


def _distinct(documents: Sequence[Document]) -> list[Document]:
    distinct: dict[str, Document] = {}
    for document in documents:
        distinct.setdefault(document.text, document)
    if len(distinct) < len(documents):
        log.warning(
            "%d of %d documents repeat the text of another; each text counts once",
            len(documents) - len(distinct),
            len(documents),
        )
    return list(distinct.values())


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_file(path: Path) -> list[Document]:
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"text file {path} doesn't exist; check the path") from None
    except (OSError, lzma.LZMAError) as error:
        raise InputError(f"text file {path} can't be read ({error}); give a text file") from error
    content = _decode(path, raw)
    documents = _json_lines(path, content) if path.suffix == ".jsonl" else _plain(path, content)
    if not documents:
        raise InputError(f"text file {path} holds no text; give a file with at least one document")
    return documents


def _decode(path: Path, raw: bytes) -> str:
    """Decode a text file and normalise its line ends."""
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "UTF-8")
    try:
        content = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"text file {path} isn't {encoding.removesuffix('-sig')} (byte {error.start}); convert "
            "it to UTF-8 first, for example with iconv"
        ) from error
    if "\0" in content:
        raise InputError(
            f"text file {path} holds NUL characters, as UTF-16 without a byte order mark does; "
            "convert it to UTF-8 first, for example with iconv"
        )
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _read_dataset(source: str) -> list[Document]:
    parts = source.removeprefix(DATASET_PREFIX).split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"dataset {source!r} must be hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    name, *config, split = parts
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"dataset {source!r} needs an optional package; pip install 'bh-routing[datasets]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, *config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"dataset {source!r} can't be loaded ({reason}); check its name, split and the network"
        ) from error
    if "text" not in rows.column_names:
        raise InputError(
            f"dataset {source!r} has no column 'text', it has {', '.join(rows.column_names)}; "
            "give one that has, or a JSONL file"
        )
    texts = [str(text) for text in rows["text"] if str(text).strip()]
    return [Document(f"{name}-{i}", text, _key(text), name) for i, text in enumerate(texts)]


def _plain(path: Path, content: str) -> list[Document]:
    pieces = _SEPARATOR_LINE.split(content)
    texts = [piece.strip() for piece in pieces if piece.strip()]
    stem = path.name.removesuffix(".xz").removesuffix(".txt")
    labels = _labels(path, stem)
    documents = []
    for i, text in enumerate(texts):
        label = labels.get(i, {})
        cluster = str(label.get("cluster", _key(text)))
        documents.append(Document(f"{stem}-{i}", text, cluster, str(label.get("domain", stem))))
    return documents


def _labels(path: Path, split: str) -> dict[int, dict[str, object]]:
    """Read the labels of a text file's documents from `documents.json` next to it."""
    file = path.with_name("documents.json")
    if not file.exists():
        return {}
    try:
        entries = json.loads(_decode(file, file.read_bytes()))
        return {int(e["index"]): e for e in entries if e["split"] == split}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file} names no documents ({type(error).__name__}: {error}); it must be a list of "
            "objects with split and index: correct it, or move it away"
        ) from error


def _json_lines(path: Path, content: str) -> list[Document]:
    documents = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = entry["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"line {number} of {path} isn't a JSON object with a 'text'; got {line[:60]!r}"
            ) from error
        name, domain = entry.get("name", f"{path.stem}-{number}"), entry.get("domain", path.stem)
        cluster = entry.get("cluster", _key(str(text)))
        documents.append(Document(str(name), str(text), str(cluster), str(domain)))
    return documents
