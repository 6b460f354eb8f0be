"""No memory left: what is finished stays, and what failed says what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.cli.main import main
from bh_routing.engine.generate import generate_routed
from bh_routing.results.records import JOURNAL
from tests.cli.test_run import QUIET

RUN = ["run", "--model", "demo", "--device", "cpu", "--configs", "topk_8", "--max-tokens", "2"]
LIMITED = """
import resource, sys
import bh_routing.experiments.run
from bh_routing.cli.main import main

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.usefixtures("loaded_demo")
def test_out_of_memory_fails_its_row_with_the_remedy_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_on_the_first(model: Any, tokenizer: Any, prompt: str, *rest: Any) -> Any:
        if "Once" in prompt:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return generate_routed(model, tokenizer, prompt, *rest)

    target = "bh_routing.experiments.experiment.generate_routed"
    monkeypatch.setattr(target, fail_on_the_first)
    arguments = [*RUN, "--no-eval", "--timing-rounds", "0", "--output", str(tmp_path / "r")]
    assert main(arguments, QUIET) == 1
    err = capsys.readouterr().err
    assert "topk_8 on 'Once upon a time' failed: out of memory" in err
    assert "--device cpu" in err and "fewer tokens" in err
    lines = (tmp_path / "r" / JOURNAL).read_text().splitlines()
    assert [json.loads(line)["record"]["status"] for line in lines] == ["failed", "ok"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space as Linux does")
def test_a_batch_that_does_not_fit_loses_no_experiment(tmp_path: Path) -> None:
    # Windows one at a time fit; so many at once need more than 1.2 GB.
    large = ["--tokens", "30000", "--batch-size", "512", "--output", str(tmp_path / "r")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(10**9), *RUN, "--prompts", "1", *large],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "scoring failed (out of memory; use --device cpu, a smaller batch size" in done.stderr
    [line] = (tmp_path / "r" / JOURNAL).read_text().splitlines()
    assert json.loads(line)["record"]["status"] == "ok"
