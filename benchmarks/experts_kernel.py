"""Time a layer's experts on a GPU: ours compared with transformers', at 8 and 4 kept experts.

python benchmarks/experts_kernel.py [FILE.json [TOKENS ...]]

The shape is OLMoE-1B-7B's, with random weights; each layer of a pass has its own weights, so that
no layer finds them in the cache. A dropped slot has weight 0 and the index of the token's first
expert, which transformers computes nevertheless: that is its cost with fewer experts. Bytes are the
required memory traffic: the weights of each distinct kept expert once, hidden states in and out.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch.nn.functional import grouped_mm
from transformers import OlmoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from bh_routing.kernels.experts import NAME, sparse_experts_forward

SLOTS = 8
LAYERS = 16
TOKENS = (1, 4, 16, 64, 512, 4096)
MOST_TOKENS_IN_A_GRAPH = 64
ROUNDS = 11
ROUNDS_OF_EAGER = 3
Pass = Callable[[], Any]


def make_layers() -> list[Any]:
    config = OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64)
    with torch.device("cuda"):
        layers = [OlmoeExperts(config).to(torch.bfloat16) for _ in range(LAYERS)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    return layers


def torch_grouped(
    experts: Any, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Mix by torch's grouped product over kept slots, sorted by expert; no host sync."""
    num_experts, num_slots = len(experts.down_proj), index_TK.shape[1]
    expert_P = torch.where(weights_TK != 0, index_TK, num_experts).flatten()
    sorted_P, order_P = expert_P.sort(stable=True)
    every_E = torch.arange(num_experts, device=index_TK.device)
    ends_E = torch.searchsorted(sorted_P, every_E, right=True).int()
    up_PN = grouped_mm(
        hidden_TH[order_P // num_slots], experts.gate_up_proj.transpose(1, 2), offs=ends_E
    )
    inner_PF = experts._apply_gate(up_PN)
    down_PH = grouped_mm(inner_PF, experts.down_proj.transpose(1, 2), offs=ends_E)
    outputs_PH = torch.empty_like(down_PH)
    outputs_PH[order_P] = down_PH
    weighted_TKH = outputs_PH.view(*index_TK.shape, -1) * weights_TK[..., None]
    # Rows of dropped slots are uninitialised.
    mixed_TH: torch.Tensor = weighted_TKH.where(weights_TK[..., None] != 0, 0.0).sum(1)
    return mixed_TH


def make_routing(tokens: int, mean_kept: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random experts; at a mean of 4, a single token keeps 4 of 8, each of several 1 to 7."""
    generator = torch.Generator().manual_seed(seed)
    weights, index = torch.rand(tokens, 64, generator=generator).topk(SLOTS, dim=-1)
    if mean_kept < SLOTS:
        kept = torch.randint(1, 2 * mean_kept, (tokens, 1), generator=generator)
        if tokens == 1:
            kept.fill_(mean_kept)
        is_dropped = torch.arange(SLOTS) >= kept
        weights = weights.masked_fill(is_dropped, 0.0)
        index = torch.where(is_dropped, index[:, :1], index)
    return index.cuda(), weights.to(torch.bfloat16).cuda()


def make_pass(name: str, layers: list[Any], hidden: torch.Tensor, routings: list[Any]) -> Pass:
    def run() -> None:
        for layer, routing in zip(layers, routings, strict=True):
            layer.config._experts_implementation = name
            layer(hidden, *routing)

    return run


def in_a_graph(run: Pass) -> Pass:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(runs: dict[str, Pass]) -> dict[str, list[float]]:
    """Time every pass in every round, in random order, so that drift affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    # Reading it keeps the GPU busy while the host prepares a launch, which isn't part of a pass,
    # and leaves no dirty cache lines to write back during the pass.
    filler = torch.zeros(2**28, dtype=torch.bfloat16, device="cuda")
    for round_ in range(ROUNDS + 1):
        for name in random.Random(round_).sample(list(runs), len(runs)):
            if name.startswith("eager") and round_ > ROUNDS_OF_EAGER:
                continue  # the host's loop over experts takes up to a second
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            filler.sum()
            start.record()
            runs[name]()
            end.record()
            torch.cuda.synchronize()
            if round_:
                times[name].append(start.elapsed_time(end))
    return times


def copied_bytes_per_second() -> float:
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = milliseconds({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.numel() / (statistics.median(times) / 1000)


def measure(layers: list[Any], tokens: int, mean_kept: int) -> Iterator[dict[str, Any]]:
    """Yield a row per implementation and launch method, in microseconds per layer."""
    layers = layers if tokens <= MOST_TOKENS_IN_A_GRAPH else layers[:4]
    hidden = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
    routings = [make_routing(tokens, mean_kept, seed) for seed in range(len(layers))]
    names = ["eager", "grouped_mm", NAME] + (["batched_mm"] if tokens <= 16 else [])
    names += ["torch_grouped"] if tokens > MOST_TOKENS_IN_A_GRAPH else []
    passes = {name: make_pass(name, layers, hidden, routings) for name in names}
    runs = {f"{name} plain": run for name, run in passes.items()}
    if tokens <= MOST_TOKENS_IN_A_GRAPH:
        # transformers' eager experts synchronise with the device, which no graph can capture.
        runs |= {f"{name} graph": in_a_graph(passes[name]) for name in names if name != "eager"}
    kept = sum(int((weights != 0).sum()) for _, weights in routings)
    distinct = sum(len(index[weights != 0].unique()) for index, weights in routings)
    matrices = 3 * 2048 * 1024
    moved = (distinct * matrices + len(layers) * 2 * hidden.numel()) * 2 / len(layers)
    for name, times in milliseconds(runs).items():
        microseconds = sorted(1000 * value / len(layers) for value in times)
        implementation, launch = name.split()
        median = statistics.median(microseconds)
        yield {
            "implementation": implementation,
            "launch": launch,
            "tokens": tokens,
            "mean_kept": kept / len(layers) / tokens,
            "distinct_experts": distinct / len(layers),
            "layer_us": median,
            "layer_us_range": [microseconds[0], microseconds[-1]],
            "bytes": moved,
            "teraflops_per_second": 2 * matrices * kept / len(layers) / median / 1e6,
        }


@torch.inference_mode()
def main() -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, sparse_experts_forward)
    ALL_EXPERTS_FUNCTIONS.register("torch_grouped", torch_grouped)
    copied = copied_bytes_per_second()
    layers = make_layers()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, triton)},
        "shape": "OLMoE-1B-7B: hidden 2048, expert 1024, 64 experts, 8 slots, bfloat16",
        "rounds": ROUNDS,
        "rounds_of_eager": ROUNDS_OF_EAGER,
        "copied_bytes_per_second": copied,
        "rows": [],
    }
    print(f"{result['gpu']}, {result['versions']}, copies {copied / 1e12:.2f} TB/s")
    print("tokens  kept  distinct  launch  experts     us a layer (range)   of copy   TFLOP/s")
    for tokens in [int(size) for size in sys.argv[2:]] or TOKENS:
        for mean_kept in (8, 4):
            for row in measure(layers, tokens, mean_kept):
                row["share_of_copy"] = row["bytes"] / (row["layer_us"] / 1e6) / copied
                result["rows"].append(row)
                low, high = row["layer_us_range"]
                print(
                    f"{tokens:6}  {row['mean_kept']:4.2f}  {row['distinct_experts']:8.1f}"
                    f"  {row['launch']:6}  {row['implementation']:10}  {row['layer_us']:9.1f}"
                    f" ({low:.1f} to {high:.1f})  {row['share_of_copy']:5.2f}"
                    f"  {row['teraflops_per_second']:7.1f}"
                )
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
