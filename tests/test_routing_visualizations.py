"""The root script works in a clone that nobody installed."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import routing_visualizations

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # -I would also hide PYTHONPATH from us; an empty one is enough, and -S drops the installation
    # that an editable install would add.
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={"PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_it_finds_the_source_of_its_clone_and_needs_no_torch(tmp_path: Path) -> None:
    program = """
import sys
import routing_visualizations as rv
rv.plot_expert_count_distribution([1, 4, 8], method_name="bh", alpha=0.05, save_path="counts.png")
assert "torch" not in sys.modules, "torch was loaded"
"""
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "counts.png").is_file()


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    script = (ROOT / "routing_visualizations.py").read_text(encoding="utf-8")
    (tmp_path / "alone.py").write_text(script, encoding="utf-8")
    program = """
import sys
sys.modules["bh_routing"] = None
try:
    import alone
except ModuleNotFoundError as error:
    print(error)
"""
    done = run(program, tmp_path)
    assert "pip install" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


def test_the_signature_that_users_call_stays() -> None:
    function = routing_visualizations.plot_expert_count_distribution
    assert list(inspect.signature(function).parameters) == [
        "counts",
        "method_name",
        "alpha",
        "save_path",
    ]
