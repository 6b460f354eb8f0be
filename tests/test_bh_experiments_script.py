"""`python test_bh_experiments.py`: seven checks, in a clone without an installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "test_bh_experiments.py"


@pytest.mark.timeout(400)
def test_all_seven_checks_pass_and_the_total_is_printed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed (") == 7
    assert done.stdout.endswith("7 of 7 checks passed\n")
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_is_named_and_the_exit_code_says_so(tmp_path: Path) -> None:
    code = (
        "import sys, test_bh_experiments as checks\n"
        "def broken(): raise checks.CheckFailed('two and two are five')\n"
        "checks.CHECKS.clear()\n"
        "checks.CHECKS['arithmetic'] = broken\n"
        "sys.exit(checks.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "arithmetic" in done.stdout
    assert "two and two are five" in done.stdout
    assert done.stdout.endswith("0 of 1 checks passed\n")


@pytest.mark.parametrize("place", ["in the clone", "alone"])
def test_without_the_libraries_one_sentence_says_what_to_install(
    tmp_path: Path, place: str
) -> None:
    script = SCRIPT if place == "in the clone" else Path(shutil.copy(SCRIPT, tmp_path))
    done = subprocess.run(
        [sys.executable, "-S", str(script)],  # -S: as if nothing were installed
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "make setup" in done.stderr
