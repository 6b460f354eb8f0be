from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bh_routing
from bh_routing.cli.main import main

ROOT = Path(__file__).parents[2]


def test_help_and_version_succeed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main(["run", "--help"]) == 0
    assert main(["--version"]) == 0
    assert bh_routing.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["run", "--modle", "demo"], "--modle"),
        (["run", "--max-tokens", "many"], "'--max-tokens'"),
        (["fly"], "fly"),
        (["run", "--max-tokens", "0"], "--max-tokens must be greater than or equal to 1, got 0"),
        (["run", "--device", "tpu"], "'tpu'"),
        (["run", "--executor", "cloud"], "'cloud'"),
        (["run", "--model", "demo", "--configs", "topk_9"], "did you mean 'topk_8'"),
        (["run", "--configs", ","], "no configuration is left"),
        (["run", "--prompts", "13"], "run from 1 to 12"),
        (["run", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "--model", "./nowhere"], "--model demo"),
        (["run", "--model", ""], "model"),
        (["export", "nowhere", "--to", "xlsx"], "nowhere"),
        (["export", "nowhere", "--to", "pdf"], "pdf"),
        (["calibrate", "--output", "x", "--nulls", "gausian"], "did you mean 'gaussian'"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(
    arguments: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.err.startswith("bh-routing: ") and captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_torchrun_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert main(["run", "--model", "demo"]) == 2
    assert "started by torchrun" in capsys.readouterr().err


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) in (0, 2)
    captured = capsys.readouterr()
    assert "calibrate" in captured.out + captured.err


def test_a_hub_model_without_network_ends_at_once_and_names_the_demo(tmp_path: Path) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "bh_routing", "run", "--model", "allenai/OLMoE-1B-7B-0924"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "", "HOME": str(tmp_path / "home")}
        # A proxy that nobody answers: no network, wherever this test runs.
        | {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "can't be reached" in done.stderr and "--model demo" in done.stderr
    first, problem = done.stderr.splitlines()
    assert first.startswith("importing") and problem.startswith("bh-routing: ")
    assert not (tmp_path / "results").exists()
    assert time.monotonic() - start < 60  # 30 s of patience, on a machine half as busy


def test_help_loads_neither_torch_nor_pandas(tmp_path: Path) -> None:
    code = (
        "import sys; from bh_routing.cli import main; code = main(['run', '--help']);"
        "print(code, sorted({'torch', 'pandas', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []"


COMMAND = [sys.executable, "-m", "bh_routing", "run"]
SCRIPT = [sys.executable, "run_bh_experiments.py"]


def start_in_vain(command: list[str], **changes: str) -> list[str]:
    """Start a run of a model that doesn't exist, in a fresh process; return stderr's lines."""
    steering = ("OMP_", "GOMP_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    done = subprocess.run(
        [*command, "--model", "./nowhere"],
        env=env | {"PYTHONPATH": "src", "OMP_DISPLAY_ENV": "true"} | changes,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    return done.stderr.splitlines()


@pytest.mark.parametrize("command", [COMMAND, SCRIPT], ids=["command", "script"])
def test_the_first_line_comes_before_the_slow_imports(command: list[str]) -> None:
    first, *rest = start_in_vain(command)
    assert first.startswith("importing ")
    assert any("OMP_WAIT_POLICY" in line for line in rest)  # written when torch is loaded


@pytest.mark.parametrize("command", [COMMAND, SCRIPT], ids=["command", "script"])
def test_threads_wait_without_spinning(command: list[str]) -> None:
    lines = start_in_vain(command)
    assert any("OMP_WAIT_POLICY = 'PASSIVE'" in line for line in lines)


def test_a_wait_policy_that_the_user_set_stays() -> None:
    lines = start_in_vain(COMMAND, OMP_WAIT_POLICY="active")
    assert any("OMP_WAIT_POLICY = 'ACTIVE'" in line for line in lines)
    assert not any("OMP_WAIT_POLICY = 'PASSIVE'" in line for line in lines)


def test_importing_the_library_sets_nothing() -> None:
    code = "import os, bh_routing.cli.main, bh_routing; bh_routing.TopK; print(dict(os.environ))"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"PYTHONPATH": "src"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "OMP_WAIT_POLICY" not in done.stdout
