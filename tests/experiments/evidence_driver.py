"""Parts of an evidence folder without a model, for new processes: quick to import."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from bh_routing.errors import CalibrationError, ModelError
from bh_routing.experiments.evidence import EvidenceSpec, evidence
from bh_routing.results.files import render_json, write_atomically
from bh_routing.results.records import ESTIMATE_JSON, EVIDENCE_PARTS

SECONDS = {"calibration": 60.0, **dict.fromkeys(EVIDENCE_PARTS, 120.0)}


def run_part(spec: EvidenceSpec, part: str) -> None:
    """Note that a part ran; nulls has an error, wrong_drops a bug, pruning is killed."""
    if part == "estimate":
        content = {"seconds": SECONDS, "memory_bytes": 2**30}
        write_atomically(spec.output / part / ESTIMATE_JSON, render_json(content))
        return
    with (spec.output / "order").open("a") as stream:
        stream.write(f"{part}\n")
    if (spec.output / "mended").exists():
        return
    if part == "nulls":
        raise ModelError("the router of this family has no logits")
    if part == "wrong_drops":
        raise ZeroDivisionError("a bug of ours")
    if part == "pruning":
        os.kill(os.getpid(), signal.SIGKILL)


def run_uncalibrated(spec: EvidenceSpec, part: str) -> None:
    """Fail in the calibration only."""
    if part == "estimate":
        run_part(spec, part)
    if part == "calibration":
        raise CalibrationError("the model gives no gradients")


def run_slowly(spec: EvidenceSpec, part: str) -> None:
    """Write the process id of a part, and take longer than a test waits."""
    run_part(spec, "estimate")
    if part == "calibration" and not (spec.output / "mended").exists():
        (spec.output / "pid").write_text(str(os.getpid()))
        time.sleep(120)


def main() -> None:
    """Run slow parts in the folder that the command line names."""
    spec = EvidenceSpec(model="demo", output=Path(sys.argv[1]), parts=["nulls"])
    evidence(spec, run_slowly, lambda folder: None)


if __name__ == "__main__":
    main()
