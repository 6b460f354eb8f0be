from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are Unix's")


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 1), pytest.param(20, 2, marks=pytest.mark.full)], ids=["3", "20"]
)
def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(
    kills: int, seed: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.experiments.kill_driver",
            str(tmp_path),
            str(kills),
            str(seed),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["experiments"] == 6
    assert found["kills"] == kills
    assert set(found["exit_codes"]) == {0}, done.stderr[-3000:]
    assert all(found["equal"]) and found["equal"]
    assert set(found["done_twice"]) == {0}
