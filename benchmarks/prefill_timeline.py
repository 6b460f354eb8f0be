"""Time the kernels of a prefill, and tiles of the experts' grouped products, on a GPU.

    python -m benchmarks.prefill_timeline

OLMoE-1B-7B's shape with random weights. First ms per prompt and number of launches by kernel, then
us per layer of 4,096 tokens for tiles (pairs, outputs, inputs, warps, stages) at 8 and 4 slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import bh_routing.kernels.experts_triton as kernels
from bh_routing.engine.decode import engine_of
from bh_routing.engine.timing import stopwatch, time_interleaved
from bh_routing.experiments.bench import random_tokens
from bh_routing.kernels.experts import read_experts
from bh_routing.models.shapes import make_olmoe_shape
from bh_routing.rules import TopK

TOKENS, SHOWN = 4096, 12
UP = [(128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 3), (128, 128, 32, 8, 4)]
DOWN = [(128, 256, 64, 8, 4), (128, 128, 64, 4, 4), (64, 256, 64, 4, 4), (128, 128, 128, 8, 3)]


def report_kernels(call: Callable[[], Any], calls: int) -> None:
    """Print the device's time per call by kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in recorded.events():
        sums[event.name][0] += event.device_time / 1000 / calls
        sums[event.name][1] += 1 / calls
    for name, (ms, launches) in sorted(sums.items(), key=lambda each: -each[1][0])[:SHOWN]:
        print(f"   {ms:8.3f} ms {launches:5.0f} x {name[:80]}", flush=True)


def report_tiles(layers: list[Any], hidden: int) -> None:
    """Print the time of one layer's experts by tile."""
    weights, index_TK = torch.rand(TOKENS, len(layers[0].up), device="cuda").topk(8)
    hidden_TH = torch.randn(TOKENS, hidden, device="cuda", dtype=torch.bfloat16)
    eight_TK = weights.bfloat16()
    four_TK = eight_TK.clone()
    four_TK[:, 4:] = 0
    choose = kernels.choose_tile
    for up, down in [(up, DOWN[0]) for up in UP] + [(UP[0], down) for down in DOWN[1:]]:
        kernels.choose_tile = lambda *_, is_gated, up=up, down=down: kernels.Tile(
            *(up if is_gated else down)
        )

        def runs(weights_TK: torch.Tensor) -> Callable[[], float]:
            def mix_all() -> None:
                for layer in layers:
                    kernels.mix_grouped(layer, hidden_TH, index_TK, weights_TK)

            return stopwatch(mix_all, hidden_TH.device)

        times = time_interleaved({"8": runs(eight_TK), "4": runs(four_TK)}, rounds=3)
        us = {name: 1e6 * timing.low_sec / len(layers) for name, timing in times.items()}
        print(f"up {up}, down {down}: {us['8']:.0f} us at 8, {us['4']:.0f} at 4", flush=True)
    kernels.choose_tile = choose


@torch.inference_mode()
def main() -> None:
    """Print both tables."""
    model, _ = make_olmoe_shape(torch.device("cuda"), torch.bfloat16)
    engine = engine_of(model)
    for tokens in (128, TOKENS):
        prompt = random_tokens(model, 1, tokens).tolist()
        for k in (8, 4):
            session = engine.session(engine.bind(model, TopK(k), None), 1, tokens, tokens)
            for _ in range(3):  # compiles, and captures
                session.start(prompt)
            print(f"{tokens} tokens, top-k {k}")
            report_kernels(lambda session=session, prompt=prompt: session.start(prompt), 2)
    report_tiles([read_experts(layer.experts) for layer in engine.decoder.layers], 2048)


if __name__ == "__main__":
    main()
