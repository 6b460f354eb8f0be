from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bh_routing.cli.main import main, process_arguments
from bh_routing.cli.options import Overrides
from bh_routing.results.records import (
    JOURNAL,
    LOG,
    REPORT_HTML,
    REPORT_MD,
    RESULTS_CSV,
    SUMMARY_JSON,
)

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "run_bh_experiments.py"

TINY = ["--model", "demo", "--device", "cpu", "--max-tokens", "3", "--no-eval"]
TINY += ["--timing-rounds", "1"]
CONFIGS: dict[str, dict[str, Any]] = {
    "topk_8": {"method": "topk", "k": 8},
    "bh": {"method": "bh", "alpha": 0.2, "null": "gaussian"},
}
PROMPTS = [{"text": "Once upon a time", "category": "simple"}, {"text": "Water boils at"}]


def no_summary(results: Any) -> dict[str, Any]:
    return {"rows": len(results)}


def nothing(*_: Any) -> None:
    pass


QUIET = Overrides(
    configs=CONFIGS, prompts=PROMPTS, analyze=no_summary, visualize=nothing, report=nothing
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The root script, imported anew, with three functions that take no time."""
    spec = importlib.util.spec_from_file_location("run_bh_experiments", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    for name in ("analyze_results", "create_visualizations", "generate_markdown_report"):
        assert callable(getattr(module, name))
    monkeypatch.setattr(module, "analyze_results", no_summary)
    monkeypatch.setattr(module, "create_visualizations", nothing)
    monkeypatch.setattr(module, "generate_markdown_report", nothing)
    for name in ("ROUTING_CONFIGS", "TEST_PROMPTS"):
        monkeypatch.setattr(module, name, getattr(module, name).copy())
    return module


@pytest.mark.usefixtures("loaded_demo")
def test_json_goes_to_stdout_and_the_rest_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *TINY, "--output", str(tmp_path / "r"), "--json"], QUIET) == 0
    captured = capsys.readouterr()
    outcome = json.loads(captured.out)
    assert (outcome["experiments"], outcome["run_now"], outcome["problems"]) == (4, 4, [])
    assert outcome["mean_experts"]["topk_8"] == 8.0
    assert "loaded demo" in captured.err and "experts=" in captured.err
    log = (tmp_path / "r" / LOG).read_text(encoding="utf-8")
    assert "loaded demo" in log and "[4/4] bh on 'Water boils at'" in log


@pytest.mark.usefixtures("loaded_demo")
def test_a_file_and_subsets_choose_the_grid(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "configs: {mine: {method: topk, k: 2}}\nprompts: [{text: Hello, category: greeting}]\n"
    )
    flags = ["--config", str(mine), "--configs", "mine,topk_8", "--prompts", "greeting,1"]
    assert main(["run", *TINY, "--output", str(tmp_path / "r"), *flags], QUIET) == 0
    lines = (tmp_path / "r" / JOURNAL).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line)["record"] for line in lines]
    assert [(r["config_name"], r["prompt_text"]) for r in records] == [
        ("topk_8", "Once upon a time"),
        ("topk_8", "Hello"),
        ("mine", "Once upon a time"),
        ("mine", "Hello"),
    ]
    assert records[3]["max_experts"] == 2.0


@pytest.mark.usefixtures("loaded_demo")
@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--rule", "top_k:k=3", "--rule", "top_p:p=0.5"], ["top_k_k-3", "top_p_p-0.5"]),
        (["--rule", "top_k:k=3", "--configs", "topk_8"], ["topk_8", "top_k_k-3"]),
        (["--rule", "top_p", "--budget", "4", "--configs", "topk_8"], ["topk_8", "top_p@4"]),
    ],
)
def test_a_rule_in_one_word_is_run(flags: list[str], names: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "r"
    assert main(["run", *TINY, "--output", str(folder), "--prompts", "1", *flags], QUIET) == 0
    lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["record"]["config_name"] for line in lines] == names


@pytest.mark.usefixtures("loaded_demo")
def test_one_token_per_prompt_is_enough_for_a_report(tmp_path: Path) -> None:
    overrides = Overrides(configs=CONFIGS, prompts=PROMPTS)
    flags = [*TINY, "--max-tokens", "1", "--output", str(tmp_path / "r")]
    assert main(["run", *flags], overrides) == 0
    assert "speed-up, prompt" in (tmp_path / "r" / REPORT_HTML).read_text(encoding="utf-8")
    assert "speed-up, prompt" in (tmp_path / "r" / REPORT_MD).read_text(encoding="utf-8")


@pytest.mark.usefixtures("loaded_demo")
def test_a_failing_step_ends_with_1_and_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(results: Any) -> dict[str, Any]:
        raise ValueError("no numbers")

    overrides = Overrides(configs=CONFIGS, prompts=PROMPTS, analyze=fail, visualize=nothing)
    assert main(["run", *TINY, "--output", str(tmp_path / "r")], overrides) == 1
    err = capsys.readouterr().err
    assert err.count("the analysis failed (ValueError: no numbers)") == 1
    assert "Traceback" not in err
    assert "Traceback" in (tmp_path / "r" / LOG).read_text(encoding="utf-8")


@pytest.mark.usefixtures("loaded_demo")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_its_code_and_the_remedy(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def send_signal(results: Any) -> dict[str, Any]:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal came late")

    handler = signal.getsignal(signal.SIGTERM)
    overrides = Overrides(configs=CONFIGS, prompts=PROMPTS, analyze=send_signal)
    assert main(["run", *TINY, "--output", str(tmp_path / "r")], overrides) == code
    assert "interrupted: 4 of 4 experiments are finished and kept" in capsys.readouterr().err
    assert (tmp_path / "r" / RESULTS_CSV).exists()
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.usefixtures("loaded_demo")
def test_a_changed_script_changes_the_run(script: ModuleType, tmp_path: Path) -> None:
    script.ROUTING_CONFIGS["my_custom_config"] = {"method": "topk", "k": 3, "description": "mine"}
    script.TEST_PROMPTS.append({"text": "Hello", "category": "mine", "description": ""})

    def replaced(results: Any) -> dict[str, Any]:
        return {"mine": list(results["prompt_text"])}

    setattr(script, "analyze_results", replaced)  # noqa: B010
    flags = [*TINY, "--output", str(tmp_path / "r"), "--configs", "my_custom_config"]
    assert script.main([*flags, "--prompts", "mine"]) == 0
    summary = json.loads((tmp_path / "r" / SUMMARY_JSON).read_bytes())
    assert summary["mine"] == ["Hello"]


def test_the_script_has_the_users_defaults(script: ModuleType) -> None:
    assert list(script.ROUTING_CONFIGS)[:2] == ["topk_8", "bh_strict"]
    assert len(script.TEST_PROMPTS) == 12


def test_a_notebooks_own_arguments_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "/usr/lib/python3/site-packages/ipykernel_launcher.py"
    monkeypatch.setattr(sys, "argv", [kernel, "-f", "/root/kernel-1.json"])
    assert process_arguments() == []
    monkeypatch.setattr(sys, "argv", ["/usr/lib/colab_kernel_launcher.py", "--debug"])
    assert process_arguments() == []
    monkeypatch.setattr(sys, "argv", ["run_bh_experiments.py", "--model", "demo"])
    assert process_arguments() == ["--model", "demo"]


def test_the_script_alone_says_what_to_install(tmp_path: Path) -> None:
    alone = shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, "-I", "-S", alone], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install -e ." in done.stderr


def test_in_a_clone_the_script_uses_the_clones_package(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "bh_routing").symlink_to(ROOT / "src" / "bh_routing")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import run_bh_experiments, bh_routing;"
    done = subprocess.run(
        [sys.executable, "-c", code + "print(bh_routing.__file__)", str(tmp_path)],
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "src"))


@pytest.mark.usefixtures("loaded_demo")
def test_the_console_is_quiet_after_a_run(tmp_path: Path) -> None:
    logger = logging.getLogger("bh_routing")
    before = (logger.level, list(logger.handlers))
    assert main(["run", *TINY, "--output", str(tmp_path / "r")], QUIET) == 0
    assert (logger.level, list(logger.handlers)) == before
