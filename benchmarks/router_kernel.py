"""Time the fused BH router, its reference implementation and softmax + topk on one GPU.

    python benchmarks/router_kernel.py [--json FILE]

Three methods, the same for all contenders:

- plain: one call between two CUDA events, after writing a gigabyte of zeros, which empties the L2
  cache and keeps the GPU busy until the host has launched everything: GPU time, including gaps.
- graph: mean time of consecutive calls in a captured CUDA graph; their input is in the cache, as
  it is after the linear layer of a router.
- host: wall time of consecutive calls without synchronisation; for few tokens the host's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bh_routing.kernels.router import fused_router
from bh_routing.nulls import ReferenceTable, get_null
from bh_routing.rules import BenjaminiHochberg, LayerContext
from bh_routing.rules.router import SoftmaxFamily, reference_router

NUM_TOKENS = (1, 512, 8_192, 65_536)
NUM_EXPERTS, TOP_K = 64, 8
RULE = BenjaminiHochberg(0.05)
CALLS_IN_A_GRAPH, REPEATS = 20, 100
Call = Callable[[], Any]


def make_logits(num_tokens: int, seed: int) -> Tensor:
    """Return bfloat16 noise with 0 to 11 planted signals per token, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, NUM_EXPERTS, generator=generator)
    rank_TE = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(-1).argsort(-1)
    is_signal_TE = rank_TE < (torch.arange(num_tokens) % 12).unsqueeze(-1)
    return (logits_TE + 2 * is_signal_TE).bfloat16().cuda()


def make_context() -> LayerContext:
    """Return a layer whose background comes from other logits of the same distribution."""
    logits_TE = make_logits(4_096, seed=1).float()
    scores = get_null(RULE.null).reference(logits_TE, logits_TE.topk(TOP_K).indices)
    return LayerContext(
        layer=0,
        num_experts=NUM_EXPERTS,
        model_top_k=TOP_K,
        device=torch.device("cuda"),
        table=ReferenceTable.from_scores(scores),
    )


def summarise(times_us: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times_us, n=4)
    return {"median_us": median, "low_quartile_us": low, "high_quartile_us": high}


def make_events() -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    return [(event(), event()) for _ in range(REPEATS)]


def read_events(
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]], calls: int = 1
) -> dict[str, float]:
    """Return microseconds per call; the first fifth of the repeats is warm-up."""
    torch.cuda.synchronize()
    times_us = [1e3 * start.elapsed_time(end) / calls for start, end in events]
    return summarise(times_us[REPEATS // 5 :])


def time_plain(call: Call) -> dict[str, float]:
    zeros = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    events = make_events()
    for start, end in events:
        zeros.zero_()
        start.record()
        call()
        end.record()
    return read_events(events)


def time_graph(call: Call) -> dict[str, float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_A_GRAPH):
            call()
    events = make_events()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    return read_events(events, CALLS_IN_A_GRAPH)


def time_host(call: Call) -> dict[str, float]:
    times_us = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call()
        torch.cuda.synchronize()
        times_us.append(1e6 * (time.perf_counter() - start) / 100)
    return summarise(times_us[2:])


def measure(num_tokens: int, context: LayerContext) -> dict[str, Any]:
    logits_TE = make_logits(num_tokens, seed=2)
    family = SoftmaxFamily(normalises=False)
    fused, reference = fused_router(RULE, context, family), reference_router(RULE, context, family)
    assert fused is not None
    equal = [torch.equal(a, b) for a, b in zip(fused(logits_TE), reference(logits_TE), strict=True)]
    calls: dict[str, Call] = {
        "softmax_topk": lambda: logits_TE.softmax(-1, dtype=torch.float32).topk(TOP_K, dim=-1),
        "fused": lambda: fused(logits_TE),
        "reference": lambda: reference(logits_TE),
    }
    ways = {"plain": time_plain, "graph": time_graph, "host": time_host}
    times = {way: {name: run(call) for name, call in calls.items()} for way, run in ways.items()}
    return {
        "num_tokens": num_tokens,
        "mean_experts": fused(logits_TE).expert_counts_T.double().mean().item(),
        "index_weights_keep_counts_equal_the_reference": equal,
        # Reads logits; writes index, weight and mask of each slot, and one count.
        "bytes_fused": num_tokens * (2 * NUM_EXPERTS + TOP_K * (8 + 2 + 1) + 4),
        # Reads logits, writes and rereads probabilities, writes value and index of each slot.
        "bytes_softmax_topk": num_tokens * (10 * NUM_EXPERTS + TOP_K * (4 + 8)),
        "times": times,
        "fused_over_softmax_topk": {
            way: t["fused"]["median_us"] / t["softmax_topk"]["median_us"]
            for way, t in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    path = parser.parse_args().json
    context = make_context()
    rows = [measure(num_tokens, context) for num_tokens in NUM_TOKENS]
    for row in rows:
        print(f"{row['num_tokens']:6} tokens, {row['mean_experts']:.2f} experts, equal "
              f"{row['index_weights_keep_counts_equal_the_reference']}")  # fmt: skip
        for way, times in row["times"].items():
            texts = [
                f"{name} {t['median_us']:7.1f} us ({t['low_quartile_us']:.1f}-"
                f"{t['high_quartile_us']:.1f})"
                for name, t in times.items()
            ]
            ratio = row["fused_over_softmax_topk"][way]
            print(f"  {way:5}  {'  '.join(texts)}  fused / softmax + topk {ratio:.2f}")
    facts = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "rule": str(RULE),
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "rows": rows,
    }
    if path is not None:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
