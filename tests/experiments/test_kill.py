from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.experiments.conftest import run_driver

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are Unix's")


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 1), pytest.param(20, 2, marks=pytest.mark.full)], ids=["3", "20"]
)
def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(
    kills: int, seed: int, tmp_path: Path
) -> None:
    found = run_driver("kill_driver", tmp_path, kills, seed)
    assert found["experiments"] == 6
    assert found["kills"] == kills
    assert set(found["exit_codes"]) == {0}
    assert all(found["equal"]) and found["equal"]
    assert set(found["done_twice"]) == {0}
