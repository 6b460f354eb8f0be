"""Every bad input ends with its exit code and one sentence, and leaves results byte for byte."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from bh_routing.cli.main import main
from bh_routing.cli.options import Overrides
from bh_routing.experiments.experiment import find_nan
from bh_routing.experiments.folder import LOCK
from bh_routing.models.load import LoadedModel
from bh_routing.models.routers import find_routers
from bh_routing.results.records import (
    CHECKPOINT,
    JOURNAL,
    LOG,
    PLOTS,
    QUALITY_JOURNAL,
    RESULTS_CSV,
    RUN_JSON,
    TOKEN_TRACES,
)
from bh_routing.rules.fixed import TopK
from tests.cli.test_run import QUIET
from tests.experiments.chaos_driver import mount, read_files
from tests.nulls.test_calibration import make as make_calibration

RUN = ["run", "--model", "demo", "--device", "cpu", "--max-tokens", "2", "--tokens", "60"]
RUN += ["--timing-rounds", "0"]
ONE = [*RUN, "--configs", "topk_8", "--prompts", "1"]
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def finished(demo: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one experiment, with its scores and its traces."""
    folder = tmp_path_factory.mktemp("finished") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bh_routing.experiments.preparation.load_model", lambda *_, **__: demo)
        assert main([*ONE, "--output", str(folder)], QUIET) == 0
    return folder


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "results")


def change(name: str, old: bytes, new: bytes) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new, 1))

    return damage


def write(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def cut(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def link(name: str) -> Damage:
    def damage(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside / "file")

    return damage


def expect(
    arguments: list[str],
    part: str,
    capsys: pytest.CaptureFixture[str],
    code: int = 2,
    overrides: Overrides | None = QUIET,
) -> None:
    """Run a command; the last line it writes is one sentence with `part` in it."""
    capsys.readouterr()
    assert main(arguments, overrides) == code
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("bh-routing: ") and part in last, captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


SECOND_RUN = {
    "journal-cut": (cut(JOURNAL), "truncated"),
    "journal-edited": (change(JOURNAL, b'"status":"ok"', b'"status":"no"'), "checksum"),
    "journal-older": (
        change(JOURNAL, b'"schema_version":1', b'"schema_version":0'),
        "schema version 0, this version of bh-routing writes 1",
    ),
    "journal-foreign": (write(JOURNAL, b"{}\n"), "line 1"),
    "journal-nested": (write(JOURNAL, b"[" * 100_000 + b"\n"), "line 1"),
    "csv-longer": (write(RESULTS_CSV, b"line\n" * 99), "move the CSV away"),
    "checkpoint-cut": (cut(CHECKPOINT), "put it back"),
    "run-json-cut": (cut(RUN_JSON), "put it back"),
    "run-json-older": (
        change(
            RUN_JSON,
            b'"identity": {\n    "schema_version": 1',
            b'"identity": {\n    "schema_version": 0',
        ),
        "has schema 0",
    ),
    "run-json-foreign": (write(RUN_JSON, b'{"name": "package"}'), "to a bh-routing run"),
    "quality-edited": (change(QUALITY_JOURNAL, b'"topk_8"', b'"topk_9"'), "checksum"),
    "quality-older": (
        change(QUALITY_JOURNAL, b'"schema_version":1', b'"schema_version":0'),
        "schema version 0",
    ),
    "log-elsewhere": (link(LOG), "symbolic link"),
    "lock-elsewhere": (link(LOCK), "symbolic link"),
    "plots-elsewhere": (link(PLOTS), "symbolic link"),
    "checkpoints-elsewhere": (link("checkpoints"), "symbolic link"),
}


@pytest.mark.usefixtures("loaded_demo")
@pytest.mark.parametrize("name", SECOND_RUN)
def test_a_damaged_folder_is_refused_with_its_file_and_the_ways_out(
    name: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, part = SECOND_RUN[name]
    damage(results)
    before = read_files(results)
    expect([*ONE, "--output", str(results)], part, capsys)
    assert read_files(results) == before
    assert not (results.parent / "outside" / "file").exists()


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (change(JOURNAL, b'"status":"ok"', b'"status":"no"'), "line 1 doesn't fit its checksum"),
        (change(QUALITY_JOURNAL, b'"topk_8"', b'"topk_9"'), "line 2 doesn't fit its checksum"),
        (
            change(TOKEN_TRACES, b'"slots":8', b'"slots":9'),
            "token_traces.jsonl can't be read whole: line 1 isn't a record",
        ),
        (write(TOKEN_TRACES, b"[" * 100_000 + b"\n"), "line 1 isn't a record"),
        (cut(RESULTS_CSV), "can't be read whole"),
    ],
)
def test_a_report_of_a_damaged_folder_is_refused(
    damage: Damage, part: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(results)
    capsys.readouterr()
    assert main(["report", str(results)]) == 2
    assert part in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "content", "part"),
    [
        ("--calibration", b"no tensors", "is no calibration or is damaged"),
        ("--calibration", None, "schema '1', this version reads 2, 3, 4, 5"),
        ("--config", b"a: &b 1\nc: *b", "alias"),
        ("--config", b"configs: " + b"#" * 2_000_000, "larger than 1,000,000 bytes"),
        ("--config", b"configs: !!python/object/apply:os.system ['touch x']", "valid YAML"),
        ("--config", b"configs: {../../x: {method: topk, k: 2}}", "must be 1 to 64 letters"),
        ("--config", b"prompts: [{text: ''}]", "must not be empty"),
        ("--text", b"\xfc", "isn't UTF-8"),
        ("--calibration-text", b"", "holds no text"),
    ],
)
@pytest.mark.usefixtures("loaded_demo")
def test_a_bad_file_is_refused(
    command: str,
    content: bytes | None,
    part: str,
    results: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = results.parent / "file"
    if content is None:
        older = make_calibration().save(path).read_bytes()
        content = older.replace(b'"schema":"5"', b'"schema":"1"')
        assert content != older
    path.write_bytes(content)
    before = read_files(results)
    arguments = [*RUN, "--prompts", "1", "--output", str(results), command, str(path)]
    expect(arguments, part, capsys, overrides=None)
    assert read_files(results) == before


@pytest.mark.usefixtures("loaded_demo")
def test_two_writers_are_one_too_many(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_files(results)
    with FileLock(results / LOCK):
        expect([*ONE, "--output", str(results)], "another run is writing to", capsys)
    assert read_files(results) == before


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_evaluate_and_sweep_lock_their_folder_too(
    command: str, demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for module in ("evaluate", "preparation"):
        monkeypatch.setattr(f"bh_routing.experiments.{module}.load_model", lambda *_, **__: demo)
    flags = ["--model", "demo", "--device", "cpu", "--tokens", "60", "--output", str(tmp_path)]
    if command == "evaluate":
        flags += ["--configs", "topk_8"]
    with FileLock(tmp_path / LOCK):
        expect([command, *flags], "another run is writing to", capsys)
    assert read_files(tmp_path) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MiB."""
    folder = tmp_path / "disk"
    if not mount(folder, 2**22):
        pytest.skip("a tmpfs can only be mounted by root, with the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.usefixtures("loaded_demo")
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    finished: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = shutil.copytree(finished, small_disk / "results")
    before = read_files(results)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 2**12)
    arguments = [*RUN, "--configs", "topk_8", "--prompts", "1,2", "--output", str(results)]
    expect(arguments, "No space left on device", capsys)
    after = read_files(results)
    assert {name: after[name] for name in before} == before
    filler.unlink()
    mount(small_disk, 2**24, "remount")
    assert main(arguments, QUIET) == 0
    assert read_files(results)[JOURNAL].startswith(before[JOURNAL])


@pytest.mark.usefixtures("loaded_demo")
def test_a_read_only_folder_is_one_sentence(
    finished: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = shutil.copytree(finished, small_disk / "results")
    before = read_files(results)
    mount(small_disk, 2**22, "remount", "ro")
    expect([*ONE, "--output", str(results)], "Read-only file system", capsys)
    expect([*ONE, "--output", str(small_disk / "new")], "choose another folder", capsys)
    assert read_files(results) == before


@pytest.mark.usefixtures("loaded_demo")
def test_a_folder_that_vanishes_is_noticed_and_not_made_again(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_files(results)
    away = results.with_name("away")
    real = os.write

    def move_first(descriptor: int, data: bytes) -> int:
        if results.exists() and b'"config_name":"topk_8"' in data:
            results.rename(away)
        return real(descriptor, data)

    arguments = [*RUN, "--configs", "topk_8", "--prompts", "1,2", "--output", str(results)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", move_first)
        expect(arguments, "was removed or replaced while this run was writing it", capsys)
    assert not results.exists()
    assert read_files(away)[JOURNAL].startswith(before[JOURNAL])
    away.rename(results)
    assert main(arguments, QUIET) == 0


@pytest.fixture
def broken(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A copy of the demo model whose embedding of " river" isn't a number."""
    model = copy.deepcopy(demo.model)
    river = demo.tokenizer(" river")["input_ids"][0]
    # Not shared with the head, which would give NaN for every text.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[river] = torch.nan
    loaded = LoadedModel(model, demo.tokenizer)
    for module in ("evaluate", "preparation"):
        name = f"bh_routing.experiments.{module}.load_model"
        monkeypatch.setattr(name, lambda *_, **__: loaded)
    return loaded


@pytest.mark.usefixtures("broken")
def test_nan_names_its_router_fails_its_rows_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [{"text": "The old river"}, {"text": "Once upon a time"}]
    overrides = replace(QUIET, prompts=prompts)
    where = "router model.layers.0.mlp.gate (layer 0) gave NaN or infinite logits"
    assert main([*RUN, "--no-eval", "--output", str(tmp_path / "r")], overrides) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and "try float32" in err
    assert f"topk_8 on 'The old river' failed: ExperimentError: {where}" in err
    lines = (tmp_path / "r" / JOURNAL).read_text().splitlines()
    assert [json.loads(line)["record"]["status"] for line in lines] == ["failed", "ok"] * 2


@pytest.mark.usefixtures("broken")
def test_nan_in_a_scored_document_names_document_and_router(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        '{"text": "It rained.", "name": "a"}\n{"text": "The old river ran", "name": "b"}'
    )
    flags = ["--model", "demo", "--device", "cpu", "--configs", "topk_8", "--text", str(text)]
    expect(["evaluate", *flags], "topk_8 on b: router model.layers.0.mlp.gate", capsys, code=1)


def test_nan_is_traced_to_the_layer_it_began_in(demo: LoadedModel) -> None:
    model = copy.deepcopy(demo.model)
    find_routers(model)
    # Through .data, which goes unnoticed: otherwise the routers would be probed again
    model.model.layers[3].mlp.gate.weight.data[5] = torch.inf
    assert "router model.layers.3.mlp.gate (layer 3)" in find_nan(model, TopK(8), None, [5, 6])
