"""Run, kill -9 at a random moment, resume, until as many kills as asked for have hit.

    python -m tests.experiments.kill_driver FOLDER KILLS SEED

The model is loaded once and every run is a fork, so that a kill costs a second and not ten. Each
folder that reaches its end is compared with an uninterrupted run's. Prints what happened as JSON.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bh_routing.experiments import preparation
from bh_routing.experiments.run import run
from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.models.load import LoadedModel, load_model
from bh_routing.results.records import JOURNAL, QUALITY_JOURNAL, RESULTS_CSV, TIME_COLUMNS

CONFIGS: dict[str, dict[str, Any]] = {
    "topk_8": {"method": "topk", "k": 8},
    "bh": {"method": "bh", "alpha": 0.2, "null": "gaussian"},
}
PROMPTS = [{"text": text} for text in ("Once upon a time", "The river was", "Water boils at")]
GIVE_UP_SEC = 250.0


def make_run(root: Path, name: str) -> RunSpec:
    """Return the spec of a run into `root / name`."""
    text = root / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"It was day {i} at sea." for i in range(3)))
    return make_spec(
        RunSpec,
        model="demo",
        output=root / name,
        max_tokens=8,
        checkpoint_interval=2,
        device="cpu",
        configs=CONFIGS,
        prompts=PROMPTS,
        timing_rounds=0,
        texts=[text],
    )


def start(spec: RunSpec) -> int:
    """Fork a child that does the run, and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = run(spec).exit_code
    finally:
        os._exit(code)


def run_and_kill(spec: RunSpec, delay: float) -> int | None:
    """Return the exit code of a run, or None if it was killed after `delay` seconds."""
    child = start(spec)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Read the CSV without its times."""
    with (folder / RESULTS_CSV).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{n: cell for n, cell in row.items() if n not in TIME_COLUMNS} for row in rows]


def read_keys(path: Path) -> list[str]:
    """Read the keys of a journal, in order."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [line["key"] for line in lines if "key" in line]


def main(root: Path, num_kills: int, seed: int) -> dict[str, Any]:
    """Do it, and return what happened."""
    torch.set_num_threads(1)
    loaded: LoadedModel = load_model("demo", device="cpu")
    setattr(preparation, "load_model", lambda *_, **__: loaded)  # noqa: B010
    generator = random.Random(seed)
    whole = make_run(root, "whole")
    begin = time.monotonic()
    codes = [run_and_kill(whole, delay=GIVE_UP_SEC)]
    duration = time.monotonic() - begin
    kills, folders = 0, 0
    started = time.monotonic()
    while kills < num_kills and time.monotonic() - started < GIVE_UP_SEC:
        folders += 1
        spec = make_run(root, f"killed-{folders}")
        code = None
        while code is None:
            # Once enough have hit, let the last run end.
            delay = GIVE_UP_SEC if kills >= num_kills else generator.uniform(0, duration)
            code = run_and_kill(spec, delay)
            kills += code is None
        codes.append(code)
    outputs = sorted(path for path in root.glob("killed-*"))
    keys = [read_keys(path / name) for path in outputs for name in (JOURNAL, QUALITY_JOURNAL)]
    return {
        "exit_codes": codes,
        "kills": kills,
        "folders": folders,
        "equal": [read_rows(path) == read_rows(whole.output) for path in outputs],
        "done_twice": [len(found) - len(set(found)) for found in keys],
        "experiments": len(read_rows(whole.output)),
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
