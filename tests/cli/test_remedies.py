"""Every command that a message or page of ours advises can be given as it stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from bh_routing.cli.main import app, main
from bh_routing.cli.options import OLD_SPELLINGS

SOURCE = Path(__file__).parents[2] / "src" / "bh_routing"
OTHERS_FLAGS = {
    *("--help", "--version", "--head", "--always", "--dirty", "--abbrev", "--exclude", "--no-deps"),
    *("--moe-backend", "--enable-expert-parallel", "--additional-config", "--served-model-name"),
    *("--kv-cache-memory-bytes", "--gpu-memory-utilization", "--no-enable-prefix-caching"),
    "--local-dir",
}
"""Of every command, of `ray start`, git, pip and hf, and of `vllm serve`."""
COMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands")  # noqa: B009
ADVICE = re.compile(r"bh-routing ([a-z][a-z-]*)((?: (?:--[a-z0-9-]+|[^ ;`]+))*)")


def texts(source: str) -> Iterator[str]:
    """Every text of a module that isn't a docstring, with X for what is filled in later."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(value) for value in node.values}
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
        elif id(node) not in inside | docstrings and isinstance(node, ast.Constant):
            yield str(node.value)


def options(command: Any) -> set[str]:
    return {
        flag
        for parameter in command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


def complaints(text: str) -> list[str]:
    """What is wrong with the commands and flags that a text names."""
    wrong = []
    for name, rest in ADVICE.findall(text):
        flags = re.findall(r"--[a-z][a-z0-9-]*", rest)
        if name not in COMMANDS:
            wrong += [f"no command {name}"] if flags else []
            continue
        wrong += [f"{name} has no {flag}" for flag in flags if flag not in options(COMMANDS[name])]
        if flags:
            required = {p.opts[0] for p in COMMANDS[name].params if p.required}
            wrong += [
                f"{name} needs {flag}"
                for flag in required
                if flag.startswith("--") and flag not in flags
            ]
    every = set().union(OTHERS_FLAGS, *OLD_SPELLINGS.values(), *map(options, COMMANDS.values()))
    # A style sheet's variables look like flags: var(--c12ab56), and --c12ab56:#fff to set one.
    flags = re.findall(r"(?<![\w-])(?<!var\()--[a-z][a-z0-9-]*(?![\w-]*:\S)", text)
    return wrong + [f"no {flag}" for flag in flags if flag not in every]


@pytest.mark.parametrize(
    "path",
    sorted(SOURCE.rglob("*.py")),
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_a_message_names_only_commands_and_flags_that_exist(path: Path) -> None:
    found = {text: complaints(text) for text in texts(path.read_text(encoding="utf-8"))}
    assert {text: wrong for text, wrong in found.items() if wrong} == {}


LIBRARY = (
    "analysis",
    "engine",
    "kernels",
    "models",
    "multitest",
    "nulls",
    "results",
    "rules",
    "stats",
)


@pytest.mark.parametrize("package", LIBRARY)
def test_a_message_of_the_library_names_no_command_and_no_flag(package: str) -> None:
    found = {
        text
        for path in (SOURCE / package).rglob("*.py")
        for text in texts(path.read_text(encoding="utf-8"))
        if any(name in COMMANDS for name, _ in ADVICE.findall(text))
        or re.search(r"(?<![\w-])--[a-z]", text)
    }
    assert found == set()


def test_the_command_line_names_its_command_for_an_unsupported_family(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "jetmoe"}')
    assert main(["models", "--check", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith("weights and indices; see: bh-routing models\n")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("run: bh-routing calibrate --model NAME", ["calibrate needs --output"]),
        ("bh-routing evaluate --no-resume", ["evaluate has no --no-resume"]),
        ("give another --destination", ["no --destination"]),
        ("run: bh-routing tune --level 1", ["no command tune", "no --level"]),
    ],
)
def test_a_remedy_that_does_not_exist_is_found(text: str, wrong: list[str]) -> None:
    assert complaints(text) == wrong
