"""Time a demo run on two cores, alone and alongside one busy process.

    python benchmarks/busy_neighbour.py [--rounds 3]

Each round runs both in alternating order, so that a machine that slows down affects both alike.
The busy process ends by itself. Exits with 1 if the median ratio is above LARGEST_RATIO.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext

LARGEST_RATIO = 2.5
BUSY_SEC = 900
BUSY = f"import time; end = time.monotonic() + {BUSY_SEC}\nwhile time.monotonic() < end: pass"
FLAGS = "run --model demo --configs topk_8,bh_moderate --prompts 1-3 --max-tokens 20"


def run_demo() -> float:
    """Return the seconds of one small run, as a user starts it: without thread settings."""
    steering = ("OMP_", "GOMP_", "KMP_", "MKL_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "bh_routing", *FLAGS.split(), "--output", f"{folder}/results"],
            env=env,
            check=True,
            stderr=subprocess.DEVNULL,
        )
        return time.perf_counter() - start


def busy_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUSY])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    run_demo()  # warms the file cache
    seconds: dict[str, list[float]] = {"idle": [], "busy": []}
    for number in range(rounds):
        for name in ("idle", "busy") if number % 2 == 0 else ("busy", "idle"):
            with busy_process() if name == "busy" else nullcontext() as process:
                seconds[name].append(run_demo())
                if process is not None:
                    process.kill()
        print(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:.1f} s" for k, v in seconds.items()))
    ratios = [busy / idle for idle, busy in zip(seconds["idle"], seconds["busy"], strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"cores {cores}: idle {statistics.median(seconds['idle']):.1f} s, busy "
        f"{statistics.median(seconds['busy']):.1f} s, median ratio of {rounds} rounds {ratio:.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}), allowed {LARGEST_RATIO}"
    )
    return int(ratio > LARGEST_RATIO)


if __name__ == "__main__":
    sys.exit(main())
