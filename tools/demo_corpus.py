"""Read and tokenize the text that tools/train_demo.py trains on.

    python -m tools.demo_corpus --corpus CORPUS --output PIECES

tokenizes CORPUS with the packaged tokenizer into compressed pieces that are small enough to carry
to a machine with a GPU one by one: `--corpus PIECES` of tools/train_demo.py reads them in place of
the text.
"""

from __future__ import annotations

import argparse
import lzma
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bh_routing.demo import demo_folder

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
HELDOUT = "heldout.txt.xz"
SHARED_WORDS = 13
"""A run of so many words in common with held-out text excludes a document of `more-*.txt.xz`."""
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]  # units of two bytes

Tokens = NDArray[np.uint16]


def read_documents(*paths: Path) -> list[str]:
    """The documents of files that continue each other; a line END_OF_TEXT separates documents."""
    text = ""
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            text += file.read()
    return [d.strip() for d in text.split(f"\n{END_OF_TEXT}\n") if d.strip()]


def train_tokenizer(documents: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of a vocabulary size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every third document is enough: merges of an 8k vocabulary are stable long before that.
    tokenizer.train_from_iterator((d[:200_000] for d in documents[::3]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def packaged_tokenizer() -> PreTrainedTokenizerFast:
    """The packaged model's tokenizer, so that losses on its text are comparable."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(demo_folder())
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[Tokens]:
    """Tokenize each document, with END_OF_TEXT prepended as in evaluation."""
    eos = tokenizer.eos_token_id
    encoded: list[Tokens] = []
    for start in range(0, len(documents), 256):
        batch = tokenizer.backend_tokenizer.encode_batch_fast(documents[start : start + 256])
        encoded += [np.array([eos, *e.ids], dtype=np.uint16) for e in batch]
    return encoded


def encode_shuffled(tokenizer: PreTrainedTokenizerFast, documents: list[str], seed: int) -> Tokens:
    """Tokenize documents in random order and concatenate them."""
    order = np.random.default_rng(seed).permutation(len(documents))
    return np.concatenate(encode(tokenizer, [documents[i] for i in order]))


def text_of(corpus: Path, name: str) -> list[str]:
    """The documents of `train` or `more`, without those of `more` that quote held-out text.

    `train` is the packaged model's text: it shares no document with held-out text, only phrases
    that textbooks repeat.
    """
    documents = read_documents(*sorted(corpus.glob(f"{name}*.txt.xz")))
    if name == "train":
        return documents
    heldout = {run for d in read_documents(corpus / HELDOUT) for run in runs_of_words(d)}
    return [d for d in documents if heldout.isdisjoint(runs_of_words(d))]


def runs_of_words(document: str) -> Iterator[int]:
    """Hashes of every run of SHARED_WORDS words, without punctuation and case."""
    words = [hash(word) for word in re.findall(r"\w+", document.lower())]
    return (hash(run) for run in zip(*(words[i:] for i in range(SHARED_WORDS)), strict=False))


def load_tokens(corpus: Path, names: Sequence[str], seed: int) -> Tokens:
    """Tokens of the named parts of the corpus, from its pieces if there are any."""
    pieces = [p for name in names for p in sorted(corpus.glob(f"{name}-*.tokens.xz"))]
    if not pieces:
        documents = [document for name in names for document in text_of(corpus, name)]
        return encode_shuffled(packaged_tokenizer(), documents, seed)
    with ThreadPoolExecutor() as pool:
        return np.concatenate(list(pool.map(read_piece, pieces)))


def read_piece(path: Path) -> Tokens:
    """Read the tokens of one piece."""
    return np.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u2")


def write_pieces(tokens: Tokens, folder: Path, name: str, number: int) -> None:
    """Write tokens as a number of compressed pieces of about equal size."""
    for at, piece in enumerate(np.array_split(tokens, number), start=1):
        packed = lzma.compress(piece.astype("<u2").tobytes(), filters=XZ)
        (folder / f"{name}-{at}.tokens.xz").write_bytes(packed)
        print(f"{name}-{at}: {piece.size:,} tokens, {len(packed) / 1e6:.1f} MB", flush=True)


def main() -> None:
    """Write the pieces, and a copy of the held-out text next to them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with *.txt.xz")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pieces", type=int, nargs=2, default=[4, 8], help="of train and of more")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    shutil.copy(options.corpus / HELDOUT, options.output)
    for name, number in zip(("train", "more"), options.pieces, strict=True):
        tokens = encode_shuffled(packaged_tokenizer(), text_of(options.corpus, name), seed=0)
        write_pieces(tokens, options.output, name, number)


if __name__ == "__main__":
    main()
