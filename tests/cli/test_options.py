"""Options that are derived from specs, and the old spellings of renamed ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from bh_routing.cli.main import app, main
from bh_routing.cli.options import OLD_SPELLINGS, SHORTHANDS, spell_anew
from bh_routing.errors import CalibrationError
from bh_routing.experiments import specs
from bh_routing.experiments.spec_errors import name_commands
from bh_routing.nulls import get_null
from tests.nulls.test_calibration import check, make
from tests.nulls.test_per_expert import by_expert_calibration

COMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands")  # noqa: B009
SPECS: dict[str, list[type[BaseModel]]] = {
    "run": [specs.RunSpec, specs.PromptChoice],
    "evaluate": [specs.EvaluateSpec, specs.Choice],
    "sweep": [specs.SweepSpec],
    "lm-eval": [specs.LmEvalSpec, specs.Choice],
    "calibrate": [specs.CalibrateSpec],
}


@pytest.mark.parametrize("command", SPECS)
def test_every_option_has_a_field_that_explains_it(command: str) -> None:
    fields = {name: field for model in SPECS[command] for name, field in model.model_fields.items()}
    own = {"track", "plots", "as_json", "help", *(variable for variable, _ in SHORTHANDS.values())}
    for parameter in COMMANDS[command].params:
        if parameter.name not in own:
            assert parameter.help == " ".join((fields[parameter.name].description or "").split())
            assert len(parameter.help) > 10


@pytest.mark.parametrize(
    "model", dict.fromkeys(model for models in SPECS.values() for model in models)
)
def test_every_field_says_what_it_means(model: type[BaseModel]) -> None:
    assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["run", "--eval-text", "a.txt", "--eval-tokens=60"], "run --text a.txt --tokens 60"),
        (["sweep", "--budgets", "5, 4,", "--rules", "bh,top_p"],
         "sweep --budget 5 --budget 4 --rule bh,top_p"),
        (["calibrate", "--text", "a", "--text=b"],
         "calibrate --calibration-text a --calibration-text b"),
        (["evaluate", "--text", "a"], "evaluate --text a"),
        (["run", "--eval-text"], "run --text"),
        ([], ""),
    ],
)  # fmt: skip
def test_an_old_spelling_is_the_new_one(typed: list[str], meant: str) -> None:
    assert " ".join(spell_anew(typed)[0]) == meant


@pytest.mark.parametrize(
    ("command", "old"), [(name, old) for name, known in OLD_SPELLINGS.items() for old in known]
)
def test_an_old_spelling_warns_once_and_names_the_new_one(
    command: str,
    old: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    new = OLD_SPELLINGS[command][old]
    arguments = [command, old, "7", old, "8", "--model", "./nowhere", "--output", "any"]
    assert main(arguments) == 2
    warning, *_, problem = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"bh-routing: {old} is now {new}; ")
    assert old not in problem
    assert new in {flag for parameter in COMMANDS[command].params for flag in parameter.opts}


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "--workers", "0"], "--workers must be greater than or equal to 1, got 0"),
        (["evaluate", "--margin", "0"], "--margin must be greater than 0, got 0.0"),
        (["lm-eval", "--num-fewshot", "-1"], "--num-fewshot must be greater than or equal to 0"),
        (["evaluate", "--dtype", "float16", "--no-fp16"], "--no-fp16 and --dtype float16 exclude"),
        (["sweep", "--tokens", "5"], "'--output'"),
        (["sweep", "--output", "x", "--budget", "5", "--budget", "0"], "--budget must be greater"),
        (["evaluate", "--workers", "2"], "go with --executor ray; add it"),
        (["run", "--model", ""], "--model must"),
        (["run", "--model", "demo", "--calibration", "nowhere", "--no-eval"],
         "run: bh-routing calibrate --model NAME --output FILE"),
        (["lm-eval", "--model", "./nowhere"], "check the path, or use --model demo"),
        (["run", "--device-map", "auto", "--device", "cpu", "--model", "demo", "--no-eval"],
         "--device-map auto spreads a model over GPUs; leave out --device cpu"),
    ],
)  # fmt: skip
def test_an_error_names_the_option(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert part in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["run", "evaluate", "sweep", "calibrate", "lm-eval"])
def test_float32_has_two_spellings(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def make(kind: Any, **values: Any) -> Any:
        seen.append(values["dtype"])
        raise typer.Abort

    monkeypatch.setattr("bh_routing.cli.commands.make_spec", make)
    for flags in (["--no-fp16"], ["--dtype", "float32"], []):
        main([command, "--output", "any", *flags])
    assert seen == ["float32", "float32", "auto"]


@pytest.mark.parametrize(
    ("fail", "options"),
    [
        (lambda: get_null("background").require_table(None), "--nulls background"),
        (lambda: check(make(), null="needed_by_loss"), "--nulls background,needed_by_loss"),
        (lambda: check(make(), num_layers=16), "--nulls background,pooled"),
        (lambda: check(make(), router_fingerprint="0" * 64), "--nulls background,pooled"),
        (lambda: check(by_expert_calibration(14_000, 64, num_tokens=16_384), null="per_expert",
                       alpha=0.05, num_experts=64),
         "--nulls per_expert --max-tokens 31458"),
    ],
)  # fmt: skip
def test_the_command_line_advises_its_command_where_python_advises_a_call(
    fail: Callable[[], Any], options: str
) -> None:
    with pytest.raises(
        CalibrationError, match=r"bh_routing\.calibrate\(model, tokenizer"
    ) as caught:
        fail()
    text = name_commands(str(caught.value))
    command = f"run: bh-routing calibrate {options} --model NAME --output FILE"
    assert " ".join(command.split()) in text
    assert "bh_routing.calibrate" not in text
