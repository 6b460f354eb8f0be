"""The table of docs/results.md is what the kept run of the demo model gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_of_the_demo_run_comes_from_the_kept_run() -> None:
    command = [sys.executable, "tools/write_demo_table.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0
