"""A run's conclusion, and `report`, read each file of the folder once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bh_routing.cli.main import main
from bh_routing.experiments.run import run
from bh_routing.report.conclusion import conclude_run
from bh_routing.results.records import (
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


@pytest.mark.usefixtures("loaded_demo")
def test_no_file_is_read_twice(tiny_spec: MakeTinySpec, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was day 1 at sea.\n<|endoftext|>\nIt was day 2 at sea.")
    measured = {"no_eval": False, "texts": [text], "timing_rounds": 1, "token_traces": 1}
    spec = tiny_spec(prompts=TINY_PROMPTS[:1], **measured)
    run(spec)

    def attempt(_: str, step: Callable[[], Any]) -> Any:
        return step()

    concluding = count_reads(spec.output, lambda: conclude_run(spec.output, attempt))
    assert concluding == Counter(READ_BY_BOTH)
    reporting = count_reads(spec.output, lambda: main(["report", str(spec.output)]))
    assert reporting == Counter((*READ_BY_BOTH, SUMMARY_JSON))
