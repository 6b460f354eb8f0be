"""A checkpoint that can't be run is refused in one sentence, and nothing of it is executed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bh_routing.cli.main import main
from bh_routing.demo import demo_folder
from tests.cli.test_bad_input import expect
from tests.cli.test_run import QUIET

Change = Callable[[dict[str, Any]], object]
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def make_checkpoint(folder: Path, changes: dict[str, Change], without: str = "") -> Path:
    """Link the demo's files into a folder, with some JSON files changed and some left out."""
    folder.mkdir()
    for file in demo_folder().iterdir():
        is_left_out = bool(without) and without in file.name
        if file.name in changes:
            content = json.loads(file.read_bytes())
            changes[file.name](content)
            (folder / file.name).write_text(json.dumps(content))
        elif file.suffix in (".json", ".safetensors") and not is_left_out:
            (folder / file.name).symlink_to(file)
    return folder


def run(model: Path, *flags: str) -> list[str]:
    options = ["--device", "cpu", "--max-tokens", "2", "--configs", "topk_8", "--prompts", "1"]
    return ["run", "--model", str(model), *options, "--output", str(model.parent / "r"), *flags]


@pytest.mark.parametrize(
    ("changes", "without", "part"),
    [
        (
            {"config.json": lambda c: c.update(model_type="llama", architectures=[])},
            "",
            "lacks 18 weights of the model, such as 'model.layers.0.mlp.down_proj.weight'",
        ),
        ({"config.json": lambda c: c.update(vocab_size=8300)}, "", "asks for (8300, 128)"),
        ({"config.json": lambda c: c.update(hidden_size="many")}, "", "hidden_size"),
        ({"config.json": lambda c: c.clear()}, "", "model_type"),
        ({"config.json": lambda c: c.update(model_type="new")}, "", "--model demo"),
        ({}, "model-", "can't be loaded"),
        ({}, "tokenizer", "has no tokenizer: tokenizer.json"),
        ({}, "tokenizer.json", "has no tokenizer: tokenizer.json"),
        ({"tokenizer.json": lambda c: c.update(model={})}, "", "can't be loaded"),
    ],
    ids=[
        "dense",
        "vocabulary",
        "type",
        "empty",
        "unknown",
        "weightless",
        "no-tokenizer",
        "no-words",
        "broken-tokenizer",
    ],
)
def test_what_cannot_be_loaded_is_refused(
    changes: dict[str, Change],
    without: str,
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = make_checkpoint(tmp_path / "model", changes, without)
    expect(run(model), part, capsys)
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_without_end_and_padding_tokens_runs_but_cannot_be_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def forget(content: dict[str, Any]) -> None:
        for name in TOKENS:
            content.pop(name, None)
            content.pop(f"{name}_id", None)

    names = ("tokenizer_config.json", "config.json", "generation_config.json")
    model = make_checkpoint(tmp_path / "model", dict.fromkeys(names, forget))
    expect(run(model), "neither a beginning- nor an end-of-text token", capsys)
    assert not (tmp_path / "r").exists()
    command = ["lm-eval", "--model", str(model), "--tasks", "bh_cloze", "--device", "cpu"]
    expect(command, "the tokenizer has no end-of-text token", capsys)
    assert main(run(model, "--no-eval"), QUIET) == 0


@pytest.mark.parametrize("model_type", ["olmoe", "evil"])
def test_code_in_a_checkpoint_is_never_run(
    model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    model = make_checkpoint(
        tmp_path / "model",
        {
            "config.json": lambda c: c.update(model_type=model_type, auto_map=classes),
            "tokenizer_config.json": lambda c: c.update(
                auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}
            ),
        },
    )
    ran = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    if model_type == "olmoe":  # transformers has its own code for it
        assert main(run(model, "--no-eval"), QUIET) == 0
    else:
        expect(run(model), "code of its own, which is never run", capsys)
    assert not ran.exists()


class Pickled:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_in_a_checkpoint_is_never_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pickle

    model = make_checkpoint(tmp_path / "model", {}, without="model")
    (model / name).write_bytes(pickle.dumps(Pickled(tmp_path / "ran")))
    expect(run(model), "can't be loaded", capsys)
    assert not (tmp_path / "ran").exists()
