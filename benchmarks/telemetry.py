"""Measure the cost of a server's telemetry: the same engine with and without it, by turns.

    make serving && .venv-serving/bin/python benchmarks/telemetry.py

The demo model on a CPU, 16 requests at a time, under a rule that decides by decode step. Without
telemetry no layer keeps its expert ids and no pass is counted. CPU time of the process, which other
load disturbs less than the time on the clock; medians and quartiles of the pairs' ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, PAIRS = 200, 15
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    os.environ |= SETTINGS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serve.yaml"
        path.write_text(json.dumps({"rule": {"method": "oea", "k0": 4}}))
        os.environ["BH_ROUTING_CONFIG"] = str(path)
        measure()


def measure() -> None:
    # vLLM reads the environment when it is imported.
    from vllm import LLM, SamplingParams

    from bh_routing.models.load import read_config
    from bh_routing.serving.launch import servable_checkpoint
    from bh_routing.serving.layer import _LAYERS
    from bh_routing.serving.plugin import _WATCHERS

    llm = LLM(
        servable_checkpoint("demo", read_config("demo")), dtype="float32", max_num_seqs=16,
        max_model_len=512, enforce_eager=True, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": [100 + i, 7, 9]} for i in range(16)]
    watcher, records = _WATCHERS["model"], [layer._record_TK for layer in _LAYERS.values()]

    def seconds(has_telemetry: bool) -> float:
        _WATCHERS["model"] = watcher if has_telemetry else watcher._replace(telemetry=None)
        for layer, record_TK in zip(_LAYERS.values(), records, strict=True):
            layer._record_TK = record_TK if has_telemetry else record_TK[:0]
        start = time.process_time()
        llm.generate(prompts, greedy, use_tqdm=False)
        return time.process_time() - start

    seconds(True), seconds(False)
    times: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(PAIRS):
        for has_telemetry in (pair % 2 == 0, pair % 2 == 1):
            times[has_telemetry].append(seconds(has_telemetry))
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios)
    print(f"CPU ms per step with telemetry {1e3 * statistics.median(times[True]) / STEPS:.3f}")
    print(f"CPU ms per step without {1e3 * statistics.median(times[False]) / STEPS:.3f}")
    print(f"ratio {middle:.4f}, quartiles {low:.4f} and {high:.4f}, {PAIRS} pairs")


if __name__ == "__main__":
    main()
