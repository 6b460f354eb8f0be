"""A resumed run, its conclusion, and `report` read each file of the folder once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bh_routing.cli.main import main
from bh_routing.experiments.run import run
from bh_routing.experiments.specs import RunSpec
from bh_routing.report.conclusion import conclude_run
from bh_routing.results.records import (
    CHECKPOINT,
    JOURNAL,
    QUALITY_JOURNAL,
    RESULTS_CSV,
    RUN_JSON,
    SUMMARY_JSON,
    TIMINGS,
    TOKEN_TRACES,
)
from tests.experiments.conftest import TINY_PROMPTS, MakeTinySpec

READ_BY_BOTH = (JOURNAL, QUALITY_JOURNAL, RESULTS_CSV, RUN_JSON, TIMINGS, TOKEN_TRACES)


def count_reads(folder: Path, action: Callable[[], Any]) -> Counter[str]:
    """Count how often Python opens each file of a folder for reading."""
    reads: Counter[str] = Counter()
    is_counting = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if is_counting and event == "open" and arguments[1] in ("r", "rb"):
            path = Path(str(arguments[0]))
            if path.is_relative_to(folder):
                reads[path.relative_to(folder).as_posix()] += 1

    sys.addaudithook(hook)  # can't be removed, so it is switched off
    action()
    is_counting = False
    return reads


@pytest.fixture
def measured(loaded_demo: None, tiny_spec: MakeTinySpec, tmp_path: Path) -> RunSpec:
    """The spec of a finished run that has every file."""
    text = tmp_path / "text.txt"
    text.write_text("It was day 1 at sea.\n<|endoftext|>\nIt was day 2 at sea.")
    spec = tiny_spec(
        prompts=TINY_PROMPTS[:1], no_eval=False, texts=[text], timing_rounds=1, token_traces=1
    )
    run(spec)
    return spec


def test_no_file_is_read_twice(measured: RunSpec) -> None:
    def attempt(_: str, step: Callable[[], Any]) -> Any:
        return step()

    folder = measured.output
    concluding = count_reads(folder, lambda: conclude_run(folder, attempt))
    assert concluding == Counter(READ_BY_BOTH)
    reporting = count_reads(folder, lambda: main(["report", str(folder)]))
    assert reporting == Counter((*READ_BY_BOTH, SUMMARY_JSON))


def test_a_resumed_run_reads_each_file_once(measured: RunSpec) -> None:
    reads = count_reads(measured.output, lambda: run(measured))
    # The journal's records first, then the generated tokens, which the driver doesn't keep.
    assert reads == Counter((*READ_BY_BOTH, CHECKPOINT, JOURNAL))
