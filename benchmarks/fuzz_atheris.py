"""Fuzz one target of tests/experiments/test_fuzz.py, guided by coverage, with atheris.

    pip install atheris
    python -m benchmarks.fuzz_atheris yaml -atheris_runs=20000

Atheris generates bytes that reach new lines of our readers; hypothesis derives the target's inputs
from them. It stops at the first error that isn't one of ours.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from pathlib import Path

READERS = ["bh_routing.analysis", "bh_routing.engine.texts", "bh_routing.experiments"]
READERS += ["bh_routing.results", "bh_routing.report.traces"]


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=READERS):
        fuzz = importlib.import_module("tests.experiments.test_fuzz")
    load_model = importlib.import_module("bh_routing.models.load").load_model
    logging.disable(logging.CRITICAL)
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        check, taken, strategy = fuzz.TARGETS[name][0](Path(folder), load_model("demo"))
        check(*taken)
        feed = fuzz.make_feed(check, strategy, 1)
        atheris.Setup(sys.argv, feed.hypothesis.fuzz_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
