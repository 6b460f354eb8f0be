"""The worked example of docs/adding-an-option.md: one field is an option of three commands."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from bh_routing.cli.options import with_options
from bh_routing.errors import InputError
from bh_routing.experiments import quality, specs

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-option.md"
FIELD, USE = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
AFTER = '''    """Most tokens scored, spread over the documents. Default: all."""\n'''


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`specs.py` with the page's field in `ScoredSpec`."""
    source = Path(specs.__file__).read_text("utf-8")
    assert source.count(AFTER) == 1
    file = tmp_path / "changed_specs.py"
    file.write_text(source.replace(AFTER, AFTER + FIELD), "utf-8")
    found = importlib.util.spec_from_file_location("changed_specs", file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "changed_specs", module)  # pydantic looks its source up
    found.loader.exec_module(module)
    return module


def run_command(specs: ModuleType, kind: str, *arguments: str) -> Any:
    """Return the spec that a command with these options makes."""
    made: list[Any] = []
    spec = getattr(specs, kind)

    @with_options(spec)
    def command(context: typer.Context, values: dict[str, Any]) -> int:
        made.append(specs.make_spec(spec, **values))
        return 0

    app = typer.Typer()
    app.command()(command)
    app(args=arguments, standalone_mode=False)
    return made[0] if made else None


@pytest.mark.parametrize("kind", ["RunSpec", "EvaluateSpec", "SweepSpec"])
def test_one_field_is_an_option_of_every_command_that_scores(
    kind: str, changed: ModuleType
) -> None:
    own = ["--output", "any"]
    assert run_command(changed, kind, *own).min_words == 0
    assert run_command(changed, kind, *own, "--min-words", "5").min_words == 5
    with pytest.raises(InputError, match=r"^--min-words must be greater .* or equal to 0, got -1"):
        run_command(changed, kind, *own, "--min-words", "-1")


def test_the_docstring_is_the_help_and_the_default_is_the_fields(
    changed: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run_command(changed, "EvaluateSpec", "--help")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "--min-words" in line]
    assert "Leave out documents with fewer words." in line
    assert "[default: 0]" in line


def test_the_use_reads_the_field(changed: ModuleType, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One two.\n<|endoftext|>\nThree four five six.\n")
    use = tmp_path / "use.py"
    use.write_text(USE, "utf-8")
    names = runpy.run_path(str(use), init_globals=dict(vars(quality)))
    spec = changed.make_spec(changed.EvaluateSpec, texts=[text], min_words=3)
    assert [document.text for document in names["scored_documents"](spec)] == [
        "Three four five six."
    ]
