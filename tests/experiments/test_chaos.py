"""Whatever breaks in the middle of a run, the resume ends as an uninterrupted run does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.experiments.conftest import run_driver

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the driver forks, which is Unix's")


@pytest.mark.parametrize(
    ("faults", "seed"),
    [(10, 1), pytest.param(200, 8, marks=[pytest.mark.full, pytest.mark.timeout(3600)])],
    ids=["10", "200"],
)
def test_no_fault_loses_repeats_or_spoils_an_experiment(
    faults: int, seed: int, tmp_path: Path
) -> None:
    outcomes = run_driver("chaos_driver", tmp_path, faults, seed)["outcomes"]
    assert len(outcomes) == faults
    bad = [
        outcome
        for outcome in outcomes
        if outcome["lost"]
        or outcome["twice"]
        or outcome["unreadable"]
        or outcome["changed_when_refused"]
    ]
    assert bad == []
    hit = {o["code"] for o in outcomes if o["kind"] in ("killed at a write", "SIGTERM")}
    assert hit == {-9, 143}, "the faults hit"
