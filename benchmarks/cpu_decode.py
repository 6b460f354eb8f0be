"""Time decoding of the demo model on a CPU: our experts compared with transformers'.

python benchmarks/cpu_decode.py
"""

from __future__ import annotations

import platform
import statistics
import time

import torch
import transformers

from bh_routing.engine.generate import generate_greedy
from bh_routing.kernels.experts import NAME
from bh_routing.models import load_model, route
from bh_routing.rules.fixed import TopK

TOKENS = 50
REPEATS = 7


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model("demo", device="cpu")
    print(
        f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    times: dict[tuple[str, int], list[float]] = {}
    # Interleaved, so that a machine that slows down affects all alike; the first round warms up.
    for repeat in range(REPEATS + 1):
        for implementation in ("grouped_mm", NAME):
            for k in (8, 4):
                model.set_experts_implementation(implementation)
                with route(model, TopK(k)):
                    done = generate_greedy(model, tokenizer, "The old man walked", TOKENS)
                if repeat:
                    milliseconds = 1000 * done.inference_time_sec / len(done.token_ids)
                    times.setdefault((implementation, k), []).append(milliseconds)
    for (implementation, k), values in times.items():
        spread = max(values) - min(values)
        print(
            f"{implementation:12} top-{k}  {statistics.median(values):6.2f} ms a token "
            f"(median of {len(values)}, range {spread:.2f})"
        )
    print(time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main()
