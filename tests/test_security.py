"""SECURITY.md's promises name tests that exist, and what no other test holds is held here."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from bh_routing.cli.main import main
from bh_routing.results.records import JOURNAL, PLOTS, REPORT_MD, ExperimentDetail, ExperimentRecord
from tests.experiments.conftest import make_record
from tests.experiments.test_store import IDENTITY, open_store

ROOT = Path(__file__).parents[1]
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "system", "popen", "startfile", "spawnl"}
NUMBERS = {
    field.name: 1.0
    for field in fields(ExperimentRecord)
    if field.type == "float" and field.name != "avg_experts_per_token"
}
DETAIL = ExperimentDetail(
    output_token_ids=[1, 2],
    experts_by_layer=[1.0],
    count_histogram=[[0, 2]],
    expert_load=[[1, 1]],
)


def test_every_promise_names_tests_that_exist() -> None:
    rows = [
        line.split("|")
        for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| promise")
    ]
    assert len(rows) >= 8
    for _, promise, tests, _ in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named, promise
        for file, name in named:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (promise, name)


def calls_of_code(source: str) -> list[str]:
    """Calls that could turn text into code: by name, a shell, or YAML with another loader."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        is_regex = ast.unparse(node.func) == "re.compile"
        is_model = ast.unparse(node.func).startswith("torch.")
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        is_shell = keywords.get("shell", "False") != "False"
        is_other_yaml = name in ("load", "load_all") and keywords.get("Loader", "_") not in (
            "_",
            "_Loader",
        )
        unsafe = name in NEVER_CALLED and not (is_regex or is_model or name_is_method(node))
        if unsafe or is_shell or is_other_yaml:
            found.append(ast.unparse(node))
    return found


def name_is_method(node: ast.Call) -> bool:
    """`model.eval()`, which takes nothing."""
    return isinstance(node.func, ast.Attribute) and not node.args and not node.keywords


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "__import__(name)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
    ],
)
def test_the_check_for_code_bites(source: str) -> None:
    assert calls_of_code(source)


def test_the_package_starts_no_code_from_text() -> None:
    for path in sorted((ROOT / "src").rglob("*.py")):
        assert calls_of_code(path.read_text(encoding="utf-8")) == [], path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A results folder whose configuration is called as a path."""
    folder = tmp_path / "a" / "results"
    with open_store(folder) as store:
        store.begin(IDENTITY, {}, ["0", "1"])
        for number in range(2):
            record = make_record("../../evil", f"../../../prompt {number}", **NUMBERS)
            store.add(str(number), record, DETAIL)
    return folder


def test_names_from_files_stay_in_the_folder(foreign: Path) -> None:
    assert main(["report", str(foreign)]) == 0
    assert main(["export", str(foreign), "--to", "json"]) == 0
    outside = [p for p in foreign.parents[1].rglob("*") if foreign not in (p, *p.parents)]
    assert outside == [foreign.parent]
    assert all("evil" not in path.name for path in foreign.rglob("*"))


def test_a_report_writes_through_no_link(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside = foreign.parents[1] / "thesis.md"
    outside.write_text("mine")
    (foreign / REPORT_MD).symlink_to(outside)
    assert main(["report", str(foreign)]) == 0
    assert outside.read_text() == "mine" and not (foreign / REPORT_MD).is_symlink()
    for file in (foreign / PLOTS).iterdir():
        file.unlink()
    (foreign / PLOTS).rmdir()
    elsewhere = foreign.parents[1] / "elsewhere"
    elsewhere.mkdir()
    (foreign / PLOTS).symlink_to(elsewhere)
    before = (foreign / JOURNAL).read_bytes()
    assert main(["report", str(foreign)]) == 2
    assert "is a symbolic link" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == [] and (foreign / JOURNAL).read_bytes() == before
