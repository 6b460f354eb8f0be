"""The telemetry of a server samples passes as they are, also after pauses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("prometheus_client")

from bh_routing.serving.telemetry import Telemetry


def test_passes_after_a_pause_are_sampled_like_others() -> None:
    # Each request: a pause, a pass that reads the prompt, and 99 decode steps.
    now, sampled = [0.0], []
    record_LTK = torch.zeros(1, 4, 2, dtype=torch.int32)
    telemetry = Telemetry(record_LTK, "a rule", lambda: now[0])
    for _ in range(300):
        now[0] += 5
        for number in range(100):
            now[0] += 0.01
            is_due = telemetry.is_due
            sampled += [number] * is_due
            telemetry.begin(np.ones(1, dtype=np.bool_) if is_due else None)
    assert len(sampled) >= 300
    assert sampled.count(0) < 0.1 * len(sampled)
