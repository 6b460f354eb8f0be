"""Documents come out of every kind of file that `--text` takes."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from bh_routing.engine.texts import Document, packaged_documents, read_documents
from bh_routing.engine.windows import CHAPTER_TOKENS, tokenize_documents
from bh_routing.errors import InputError
from bh_routing.models import LoadedModel


def test_a_line_of_its_own_separates_documents_packed_or_not(tmp_path: Path) -> None:
    text = "One.\n<|endoftext|>\nTwo <|endoftext|> still two.\n<|endoftext|>\n\n"
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.xz"
    plain.write_text(text)
    packed.write_bytes(lzma.compress(text.encode()))
    for path in (plain, packed):
        texts = [document.text for document in read_documents([path])]
        assert texts == ["One.", "Two <|endoftext|> still two."]


def test_a_folder_that_datasets_reads_is_a_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"text": "One."}, {"text": "  "}, {"text": "Three."}]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    documents = read_documents([f"hf:{tmp_path}:train"])
    assert [document.text for document in documents] == ["One.", "Three."]
    with pytest.raises(InputError, match="can't be loaded"):
        read_documents([f"hf:{tmp_path}:nowhere"])


def test_packaged_documents_know_their_domain_and_never_overlap() -> None:
    calibration, evaluation = (packaged_documents(s) for s in ("calibration", "evaluation"))
    assert (len(calibration), len(evaluation)) == (21, 42)
    for split in (calibration, evaluation):
        assert {d.domain for d in split} == {"textbook", "fiction", "documentation"}
    assert not {d.text for d in calibration} & {d.text for d in evaluation}
    assert not {d.cluster for d in calibration} & {d.cluster for d in evaluation}


def test_documents_that_share_a_name_are_documents_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(f"Text of {folder}.")
    rows = [{"text": f"Row {i}.", "name": "wiki"} for i in range(3)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    documents = read_documents(
        [tmp_path / "a/text.txt", tmp_path / "b/text.txt", tmp_path / "x.jsonl"]
    )
    assert [document.name for document in documents] == ["text-0", "text-0", *["wiki"] * 3]
    assert len({document.key for document in documents}) == 5
    assert len({document.cluster for document in documents}) == 5


def test_only_a_cluster_groups_documents_and_never_by_an_accident_of_names(tmp_path: Path) -> None:
    rows = [
        {"text": "One.", "cluster": "book"},
        {"text": "Two.", "cluster": "book"},
        {"text": "Three.", "name": "book"},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    clusters = [document.cluster for document in read_documents([tmp_path / "x.jsonl"])]
    assert clusters[0] == clusters[1] != clusters[2]


def test_a_text_that_is_given_twice_counts_once_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\nOne.")
    (tmp_path / "b.txt").write_text("Three.\n<|endoftext|>\nTwo.")
    documents = read_documents([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert [(d.name, d.text) for d in documents] == [
        ("a-0", "One."), ("a-1", "Two."), ("b-0", "Three."),
    ]  # fmt: skip
    assert "2 of 5 documents repeat the text of another; each text counts once" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"caf\xe9", "isn't UTF-8 \\(byte 3\\)"),
        ("a.txt", b"\xff\xfe\x00", "isn't UTF-16"),
        ("a.txt", "no mark".encode("utf-16-le"), "NUL characters, as UTF-16"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt.xz", b"not packed", "can't be read"),
        ("a.jsonl", b'{"texts": "x"}', "line 1"),
    ],
)
def test_a_file_that_is_no_text_is_named(
    tmp_path: Path, name: str, content: bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_documents([tmp_path / name])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_the_system_that_wrote_a_text_changes_nothing(
    tmp_path: Path, encoding: str, line_end: str
) -> None:
    texts = ["Größe one.\nIts second line.", "Two."]
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.xz"
    raw = "\n<|endoftext|>\n".join(texts).replace("\n", line_end).encode(encoding)
    plain.write_bytes(raw)
    packed.write_bytes(lzma.compress(raw))
    for path in (plain, packed):
        assert [document.text for document in read_documents([path])] == texts
    lines = tmp_path / "a.jsonl"
    rows = line_end.join(json.dumps({"text": text}) for text in texts)
    lines.write_bytes(rows.encode(encoding))
    assert [document.text for document in read_documents([lines])] == texts


def test_blanks_around_a_separator_and_unusual_line_ends_in_json_do_no_harm(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.txt").write_text("One.\n  <|endoftext|> \t\nTwo.\n<|endoftext|>")
    assert [d.text for d in read_documents([tmp_path / "a.txt"])] == ["One.", "Two."]
    odd = "One\u2028still one\x85and one."
    row = json.dumps({"text": odd}, ensure_ascii=False)
    (tmp_path / "b.jsonl").write_text(row, encoding="utf-8")
    assert [d.text for d in read_documents([tmp_path / "b.jsonl"])] == [odd]


def test_chapters_never_pass_for_a_document_that_has_their_name(demo: LoadedModel) -> None:
    # Two chapters, x.0 and x.1, and documents of these names.
    book = "The sea was calm. " * (CHAPTER_TOKENS // 4)
    texts = {"x.1": "One.", "x": book, "x.0": "Two."}
    documents = [Document(name, text, name, "") for name, text in texts.items()]
    pieces = tokenize_documents(demo.tokenizer, documents, max_tokens=None)
    assert [piece.name for piece in pieces] == ["x.1", "x.0", "x.1#2", "x.0#2"]
    assert len({piece.key for piece in pieces}) == 4
    again = tokenize_documents(demo.tokenizer, documents[::-1], max_tokens=None)
    assert {p.key: p.ids for p in again} == {p.key: p.ids for p in pieces}
