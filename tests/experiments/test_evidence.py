"""The protocol of docs/evidence.md: its parts run on, resume, and end with the process."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.analysis.evidence import collect_evidence
from bh_routing.cli.evidence import run_part as run_real_part
from bh_routing.cli.main import main
from bh_routing.errors import InputError, ResultsError
from bh_routing.experiments.evidence import EvidenceSpec, evidence
from bh_routing.experiments.evidence_parts import KEPT_FRACTIONS
from bh_routing.experiments.specs import make_spec
from bh_routing.experiments.wrong_drops import reader
from bh_routing.models import find_routers
from bh_routing.nulls.calibration import Calibration
from bh_routing.report.evidence import conclude_evidence
from bh_routing.results.records import CALIBRATION
from tests.experiments.evidence_driver import run_part, run_slowly, run_uncalibrated
from tests.families.checkpoints import save_tiny
from tests.families.zoo import tiny_model

FEW = ["--device", "cpu", "--tokens", "200", "--calibration-tokens", "6000"]
PARTS = ["equal_cost", "nulls", "wrong_drops", "pruning"]


def spec_of(folder: Path, **changes: Any) -> EvidenceSpec:
    return make_spec(EvidenceSpec, **{"model": "demo", "output": folder, "parts": PARTS, **changes})


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[Path]]:
    """A folder whose parts end in every way, its outcome, and the calls of `conclude`."""
    folder = tmp_path_factory.mktemp("broken")
    concluded: list[Path] = []
    return folder, evidence(spec_of(folder), run_part, concluded.append), concluded


def reasons(outcome: dict[str, Any]) -> dict[str, str | None]:
    return {part: found["reason"] for part, found in outcome["parts"].items()}


def test_a_part_that_fails_has_a_reason_and_the_others_go_on(
    broken: tuple[Path, dict[str, Any], list[Path]],
) -> None:
    folder, outcome, concluded = broken
    assert reasons(outcome) == {
        "calibration": None,
        "equal_cost": None,
        "nulls": "the router of this family has no logits",
        "wrong_drops": "ZeroDivisionError: a bug of ours",
        "pruning": "its process was ended by SIGKILL; is there enough memory?",
    }
    assert "Traceback" in (folder / "wrong_drops" / "log.txt").read_text()
    assert concluded == [folder] * 6  # after each part, and at the end


def test_without_a_calibration_only_pruning_runs(tmp_path: Path) -> None:
    outcome = evidence(spec_of(tmp_path), run_uncalibrated, lambda folder: None)
    reason = "the calibration failed: the model gives no gradients"
    assert reasons(outcome) == {
        "calibration": "the model gives no gradients",
        **dict.fromkeys(PARTS[:-1], reason),
        "pruning": None,
    }


def test_parts_that_failed_are_tried_again_and_finished_ones_are_kept(
    broken: tuple[Path, dict[str, Any], list[Path]], tmp_path: Path
) -> None:
    folder, *_ = broken
    (folder / "mended").touch()
    outcome = evidence(spec_of(folder), run_part, lambda folder: None)
    assert set(reasons(outcome).values()) == {None}
    order = (folder / "order").read_text().split()
    assert order == ["calibration", *PARTS, *PARTS[1:]]
    stamp = (folder / "estimate" / "outcome.json").stat().st_mtime_ns
    evidence(spec_of(folder), run_part, lambda folder: None)
    # Nothing is left, so not even the model is loaded.
    assert (folder / "estimate" / "outcome.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "changes", [{"tokens": 7}, {"seed": 3}, {"model": "other"}, {"dtype": "bfloat16"}], ids=str
)
def test_a_folder_of_other_settings_is_left_alone(
    changes: dict[str, Any], broken: tuple[Path, dict[str, Any], list[Path]]
) -> None:
    folder, *_ = broken
    before = (folder / "protocol.json").read_bytes()
    (name,) = changes
    with pytest.raises(ResultsError, match=rf"something else \({name}: .*choose another"):
        evidence(spec_of(folder, **changes), run_part, lambda folder: None)
    assert (folder / "protocol.json").read_bytes() == before


def test_the_estimate_comes_before_the_first_part_and_can_be_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bh_routing")
    outcome = evidence(spec_of(tmp_path, jobs=2, estimate=True), run_part, lambda folder: None)
    assert outcome["parts"] == {part: {} for part in ("calibration", *PARTS)}
    assert not (tmp_path / "order").exists()
    text = "about 5 minutes (calibration 1, equal_cost 2, nulls 2, wrong_drops 2, pruning 2) in 2 "
    assert text in caplog.text
    assert outcome["estimate"]["memory_bytes"] == 2**30


def test_a_model_that_cannot_be_loaded_is_an_error_of_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    assert main(["evidence", str(tmp_path / "no-model"), "--output", str(folder), *FEW]) == 2
    assert not (folder / "calibration").exists()


def test_an_unknown_part_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'nulls'"):
        spec_of(tmp_path, parts="nuls")


def await_true(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_after_kill_9_no_part_runs_on_and_the_command_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.experiments.evidence_driver", str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    pid = tmp_path / "pid"
    await_true(lambda: pid.exists() and pid.read_text() != "")
    process.send_signal(signal.SIGKILL)
    process.wait()
    await_true(lambda: not is_running(int(pid.read_text())))
    (tmp_path / "mended").touch()
    outcome = evidence(spec_of(tmp_path, parts=["nulls"]), run_slowly, lambda folder: None)
    assert reasons(outcome) == {"calibration": None, "nulls": None}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parts on the demo model, in this process."""
    spec = spec_of(
        tmp_path_factory.mktemp("demo"), device="cpu", tokens=200, calibration_tokens=6_000
    )
    content = spec.model_dump(mode="json", include={"model", "calibration_tokens"})
    (spec.output / "protocol.json").write_text(json.dumps(content))
    for part in ("estimate", "calibration", "wrong_drops", "pruning"):
        (spec.output / part).mkdir()
        start = time.monotonic()
        run_real_part(spec, part)
        outcome = {"reason": None, "seconds": time.monotonic() - start}
        (spec.output / part / "outcome.json").write_text(json.dumps(outcome))
    conclude_evidence(spec.output)
    return spec.output


def test_the_demo_has_every_rule_and_size_of_the_parts(demo: Path) -> None:
    found = collect_evidence(demo)
    assert {row["alpha"] for row in found["wrong_drops"]} == {0.01, 0.02, 0.05, 0.1, 0.2, 0.4}
    sizes = {(row["score"], row["fraction"]) for row in found["pruning"]}
    scores = ("reap", "fisher_mass", "frequency", "random")
    assert sizes == {(score, size) for score in scores for size in KEPT_FRACTIONS}
    losses = {(row["score"], row["keep"]): row["delta_nll"] for row in found["pruning"]}
    assert losses["random", 32] > losses["random", 56]
    assert not list((demo / "pruning").glob("tmp*"))


def test_the_demo_page_shows_the_conclusions_and_the_parts_that_were_not_run(demo: Path) -> None:
    page = (demo / "EVIDENCE.md").read_text(encoding="utf-8")
    assert page.startswith("# Evidence: demo\n")
    assert "| Pruned by Fisher mass, a model has a lower loss than by REAP | " in page
    assert "- demo: `equal_cost` wasn't run" in page
    assert json.loads((demo / "evidence.json").read_text())["scored_tokens"] <= 200


def test_the_estimate_of_the_demo_is_of_the_order_of_the_times(demo: Path) -> None:
    estimate = json.loads((demo / "estimate" / "estimate.json").read_text())
    assert estimate["model"]["num_experts"] == 64
    assert estimate["memory_bytes"] > 40e6
    for part in ("calibration", "wrong_drops", "pruning"):
        seconds = json.loads((demo / part / "outcome.json").read_text())["seconds"]
        assert seconds / 30 < estimate["seconds"][part] < 30 * seconds


@pytest.mark.parametrize(
    ("family", "is_fitted"),
    [("qwen3_moe", True), ("minimax_m2", False), ("deepseek_v3", False), ("gemma4", False)],
)
def test_a_null_that_a_family_does_not_support_is_left_out(
    family: str, is_fitted: bool, tmp_path: Path
) -> None:
    model = str(save_tiny(family, tmp_path / family))
    spec = spec_of(tmp_path, model=model, device="cpu", calibration_tokens=6_000)
    (tmp_path / "calibration").mkdir()
    run_real_part(spec, "calibration")
    fitted = Calibration.load(tmp_path / "calibration" / CALIBRATION)
    assert ("permutation" in fitted.tables) is is_fitted
    assert "background" in fitted.tables
    assert fitted.contributions is not None


def test_wrong_drops_are_judged_on_the_scores_that_a_family_ranks_by() -> None:
    model = tiny_model("minimax_m2")  # by a sigmoid plus a bias
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    ids_1S = torch.randint(3, 60, (1, 50), generator=generator)
    with reader(model) as read:
        seen = read(ids_1S)
    assert len(seen) == len(find_routers(model).sites)
    for candidates, slots in seen:
        best_TK = candidates.router_logits_TE.topk(slots.experts.shape[1]).indices
        assert torch.equal(best_TK.sort().values, slots.experts.sort().values)


@pytest.mark.full
@pytest.mark.timeout(3_000)
def test_the_whole_protocol_runs_on_the_demo(tmp_path: Path) -> None:
    assert main(["evidence", "demo", "--output", str(tmp_path), *FEW, "--jobs", "2"]) == 0
    page = (tmp_path / "EVIDENCE.md").read_text(encoding="utf-8")
    assert "wasn't run" not in page
    assert page.count("\n## ") == 8
