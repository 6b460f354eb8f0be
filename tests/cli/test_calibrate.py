"""`bh-routing calibrate` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bh_routing.cli.main import main
from bh_routing.nulls import Calibration
from tests.cli.test_bad_input import expect


@pytest.mark.full
def test_calibrate_writes_the_file_and_a_picture_of_each_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plots = tmp_path / "demo.safetensors", tmp_path / "plots"
    arguments = [
        "--model",
        "demo",
        "--output",
        str(file),
        "--plots",
        str(plots),
        "--nulls",
        "background",
    ]
    assert main(["calibrate", *arguments, "--max-tokens", "6000", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fingerprint"] == Calibration.load(file).fingerprint
    assert document["plots"] == [str(path) for path in sorted(plots.iterdir())]
    assert [Path(p).name for p in document["plots"]] == [
        "calibration_background.png", "calibration_gaussian.png",
    ]  # fmt: skip


def test_a_calibration_that_no_rule_would_take_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, text = tmp_path / "demo.safetensors", tmp_path / "mine.txt"
    text.write_text("The river ran to the sea. " * 900)
    command = ["calibrate", "--model", "demo", "--device", "cpu", "--output", str(file)]
    mine = ["--calibration-text", str(text)]
    expect([*command, "--max-tokens", "4999"], "--max-tokens must be at least 5000", capsys)
    expect(
        [*command, "--calibration-text", str(text)], "1 documents, at least 20 are needed", capsys
    )
    text.write_text("One.\n<|endoftext|>\n" * 30)
    expect([*command, *mine], "tokens, at least 5000 are needed", capsys)
    assert not file.exists()
