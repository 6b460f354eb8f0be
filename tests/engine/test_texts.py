"""Documents come out of every kind of file that `--text` takes."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from bh_routing.engine.texts import packaged_documents, read_documents
from bh_routing.errors import InputError


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
