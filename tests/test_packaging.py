"""The built wheel holds what it should, and runs where nothing else is."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import bh_routing
from bh_routing.analysis.results import load_results

ROOT = Path(__file__).parents[1]
PACKAGED_LIMIT_BYTES = 30_000_000


def run_command(command: list[str], folder: Path, timeout: int = 100) -> str:
    """Run a command outside the checkout, without this process's Python settings."""
    environment = {key: text for key, text in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    run_command([*build, str(ROOT)], folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src/bh_routing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {name.removeprefix("src/") for name in tracked if (ROOT / name).exists()}


def test_the_wheel_holds_the_demo_model_its_card_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    demo = {name.removeprefix("bh_routing/demo/") for name in names if "/demo/" in name}
    assert {"config.json", "tokenizer.json", "README.md", "calibration.txt.xz"} <= demo
    assert any(name.endswith(".safetensors") for name in demo)
    licences = {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "LICENSES.txt"}
    assert "bh_routing/py.typed" in names
    assert wheel.stat().st_size < PACKAGED_LIMIT_BYTES


def test_the_demo_files_fit_their_checksums() -> None:
    folder = ROOT / "src" / "bh_routing" / "demo"
    lines = (folder / "SHA256SUMS").read_text("utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    assert len(sums) > 5
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sums}
    assert found == sums


@pytest.mark.timeout(900)
def test_the_wheel_installs_and_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "empty"
    run_command([sys.executable, "-m", "venv", str(environment)], tmp_path)
    try:
        # Bytecode is made on first use instead: most of what is installed is never imported.
        install = [str(environment / "bin" / "pip"), "install", "--quiet", "--no-compile"]
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        run_command([*install, *constraints, str(wheel)], tmp_path, timeout=600)
        command = [str(environment / "bin" / "bh-routing"), "run", "--model", "demo"]
        small = ["--configs", "topk_8,bh_moderate", "--prompts", "1", "--max-tokens", "4"]
        run_command([*command, *small, "--no-eval"], tmp_path, timeout=200)
    finally:
        # More than a gigabyte, which pytest would keep for three sessions.
        shutil.rmtree(environment)
    experiments = load_results(tmp_path / "results").experiments
    assert list(experiments["status"]) == ["ok", "ok"]
    assert (tmp_path / "results" / "REPORT.md").is_file()


def test_requirements_and_the_project_name_the_same_ranges() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["export"]
    lines = (ROOT / "requirements_bh.txt").read_text("utf-8").splitlines()
    assert sorted(wanted) == [line for line in lines if not line.startswith("#")]


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    names = {
        re.split(r"[<>=\[; ]", requirement)[0].lower()
        for requirement in project["dependencies"] + optional["dev"] + optional["export"]
    }
    pins = (ROOT / "constraints.txt").read_text("utf-8").lower().splitlines()
    assert names - {line.split("==")[0] for line in pins} == {project["name"]}


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"version: {bh_routing.__version__}\n" in citation
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"version = {{{bh_routing.__version__}}}" in readme
