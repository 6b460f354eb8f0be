"""The doctor: what is merely missing is a warning, what stops a run is a problem and exit 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.cli.main import main
from bh_routing.experiments.doctor import (
    check_hub,
    check_statistics,
    check_versions,
    check_writing,
    examine,
)
from bh_routing.multitest import benjamini_hochberg


def test_here_a_run_is_possible_and_what_is_missing_is_a_warning(tmp_path: Path) -> None:
    findings = {finding.check: finding for finding in examine(tmp_path / "new" / "results")}
    assert list(findings) == [
        "versions", "device", "memory", "triton", "routing", "hub", "writing",
    ]  # fmt: skip
    assert not [finding for finding in findings.values() if finding.state == "problem"]
    assert findings["hub"].state == "warning"  # HF_HUB_OFFLINE is set in tests
    assert (findings["device"].state == "ok") == torch.cuda.is_available()
    assert all(finding.remedy for finding in findings.values() if finding.state != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_answers_is_fine() -> None:
    assert check_hub(lambda: True).state == "ok"


def test_another_version_is_named_with_what_is_needed() -> None:
    finding = check_versions(["torch>=99", "numpy>=1", "nowhere>=1", "polars>=1; extra == 'x'"])
    assert finding.state == "warning"
    assert finding.text == f"torch is {torch.__version__}, needed >=99; nowhere is missing"


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = check_writing(tmp_path / "file" / "results")
    assert finding.state == "problem"
    assert "can't be written to" in finding.text and "--output" in finding.remedy


def test_the_theorem_holds_here() -> None:
    rows, findings = check_statistics(2_000)
    assert [row["alpha"] for row in rows] == [0.05, 0.10]
    # The rate of BH is alpha times the fraction of unshifted experts, 0.945 on average.
    assert all(row["low"] <= 0.945 * row["alpha"] <= row["high"] for row in rows)
    assert [finding.state for finding in findings] == ["ok", "ok"]
    assert "(0.0" in findings[0].text  # the interval


def without_correction(p_TE: torch.Tensor, alpha: float) -> torch.Tensor:
    return p_TE <= alpha


def at_four_times_alpha(p_TE: torch.Tensor, alpha: float) -> torch.Tensor:
    return benjamini_hochberg(p_TE, 4 * alpha)


@pytest.mark.parametrize("reject", [without_correction, at_four_times_alpha])
def test_a_procedure_that_breaks_the_theorem_is_a_problem(
    reject: Callable[[torch.Tensor, float], torch.Tensor],
) -> None:
    findings = check_statistics(1_000, reject)[1]
    assert [finding.state for finding in findings] == ["problem", "problem"]
    assert all("install" in finding.remedy for finding in findings)


@pytest.mark.parametrize("is_file", [False, True])
def test_the_command_ends_with_1_only_where_a_run_is_impossible(
    is_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results"
    if is_file:
        output.write_text("")
    code = main(["doctor", "--output", str(output), "--statistics", "--tokens", "500", "--json"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    states = {finding["check"]: finding["state"] for finding in document["findings"]}
    assert code == int(is_file) == int(states["writing"] == "problem")
    assert len(document["statistics"]) == 2


def test_the_command_prints_a_line_a_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert all(line.split()[0] in ("ok", "warning") for line in lines)
