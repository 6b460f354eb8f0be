"""Ctrl-C and SIGTERM end each long command with their code, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bh_routing.cli.main import main
from bh_routing.experiments.quality import QualityLedger
from bh_routing.models.load import LoadedModel
from bh_routing.results.records import QUALITY_JOURNAL, QualityRecord
from tests.cli.test_run import QUIET

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


def arguments(command: str, folder: Path) -> list[str]:
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"It was day {i} at sea."}) + "\n" for i in (1, 2)))
    calibration = folder / "calibration.txt"
    calibration.write_text("The old man walked down to the river and back. " * 8)
    own = {
        "run": ["--max-tokens", "2", "--prompts", "1", "--text", str(text)],
        "evaluate": ["--configs", "topk_8,bh", "--text", str(text)],
        "sweep": [
            "--calibration-text",
            str(calibration),
            "--budget",
            "5",
            "--rule",
            "min_p",
            "--text",
            str(text),
        ],
    }
    options = ["--model", "demo", "--device", "cpu", "--output", str(folder / "r")]
    return [command, *options, *own[command]]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("command", ["run", "evaluate", "sweep"])
def test_a_signal_keeps_what_was_scored_and_the_same_command_goes_on(
    command: str, number: signal.Signals, code: int, demo: LoadedModel, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for module in ("evaluate", "preparation"):
        monkeypatch.setattr(f"bh_routing.experiments.{module}.load_model", lambda *_, **__: demo)
    add = QualityLedger.add

    def add_and_signal(self: QualityLedger, key: str, record: QualityRecord) -> None:
        add(self, key, record)
        os.kill(os.getpid(), number)

    handler: Any = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(QualityLedger, "add", add_and_signal)
        assert main(arguments(command, tmp_path), QUIET) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"bh-routing: interrupted; the same command resumes from {tmp_path / 'r'}"
    assert signal.getsignal(signal.SIGTERM) is handler
    scored = (tmp_path / "r" / QUALITY_JOURNAL).read_bytes()
    assert scored.count(b"\n") == 2, "the header, and the document that was finished"
    assert main(arguments(command, tmp_path), QUIET) == 0
    assert (tmp_path / "r" / QUALITY_JOURNAL).read_bytes().startswith(scored)


def test_an_evaluation_without_a_folder_says_what_it_would_have_kept(
    demo: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> LoadedModel:
        raise KeyboardInterrupt

    monkeypatch.setattr("bh_routing.experiments.evaluate.load_model", interrupt)
    assert main(["evaluate", "--model", "demo", "--configs", "topk_8"], QUIET) == 130
    assert "nothing was kept; with --output" in capsys.readouterr().err
