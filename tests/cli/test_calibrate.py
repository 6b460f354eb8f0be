"""`bh-routing calibrate` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bh_routing.cli.main import main
from bh_routing.nulls import Calibration


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
    assert main(["calibrate", *arguments, "--max-tokens", "400", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fingerprint"] == Calibration.load(file).fingerprint
    assert document["plots"] == [str(path) for path in sorted(plots.iterdir())]
    assert [Path(p).name for p in document["plots"]] == [
        "calibration_background.png", "calibration_gaussian.png",
    ]  # fmt: skip
