"""Time one layer's router and experts on a GPU: ours beside softmax + topk and transformers' own.

Calls are captured in a graph, as in decoding: what the host takes to launch isn't part of it.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from bh_routing.engine.timing import captured, stopwatch, time_interleaved
from bh_routing.kernels.experts import NAME, sparse_experts_forward
from bh_routing.kernels.router import fused_router
from bh_routing.kernels.router_twin import SoftmaxFamily, twin_router
from bh_routing.models.backends import experts_by
from bh_routing.models.discovery import find_routers
from bh_routing.models.routing import bind_rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg

CALLS: Final = 10
ROUTER_TOKENS: Final = (1, 512, 8_192, 65_536)
EXPERTS_TOKENS: Final = (1, 4, 16, 64, 512, 4_096)
Row = dict[str, Any]


def _microseconds(timings: Any) -> dict[str, dict[str, float]]:
    return {
        name: {
            "median": 1e6 * timing.median_sec,
            "low": 1e6 * timing.low_sec,
            "high": 1e6 * timing.high_sec,
        }
        for name, timing in timings.items()
    }


@torch.inference_mode()
def bench_router(model: Any, *, rounds: int) -> list[Row]:
    """Time BH routing of logits with a few planted signals beside softmax + topk."""
    routers = find_routers(model)
    rule = BenjaminiHochberg(alpha=0.1, max_k=routers.model_top_k, null="gaussian")
    context = bind_rule(model, rule).contexts[0]
    family = SoftmaxFamily(normalises=routers.sites[0].facts.normalises)
    routes = {"twin": twin_router(rule, context, family)}
    if (fused := fused_router(rule, context, family)) is not None:
        routes["fused"] = fused
    rows = []
    for tokens in ROUTER_TOKENS:
        generator = torch.Generator().manual_seed(tokens)
        logits = torch.randn(tokens, routers.num_experts, generator=generator)
        logits[:, :4] += 3.0
        logits_TE = logits.to(model.device, model.dtype)
        calls: dict[str, Any] = {
            name: lambda route=route, x=logits_TE: route(x) for name, route in routes.items()
        }
        calls["softmax + topk"] = lambda x=logits_TE: x.softmax(-1, dtype=torch.float32).topk(
            routers.model_top_k, dim=-1
        )
        if logits_TE.is_cuda:
            calls = {name: captured(call) for name, call in calls.items()}
        watches = {name: stopwatch(call, model.device, CALLS) for name, call in calls.items()}
        times = _microseconds(time_interleaved(watches, rounds))
        rows += [
            {
                "tokens": tokens,
                "contender": name,
                "us": time,
                "over_softmax_topk": time["median"] / times["softmax + topk"]["median"],
            }
            for name, time in times.items()
        ]
    return rows


@torch.inference_mode()
def bench_experts(model: Any, *, rounds: int, copied: float) -> list[Row]:
    """Time a layer's experts at all slots and at half of them, layers in turn."""
    routers = find_routers(model)
    modules: list[Any] = [site.experts for site in routers.sites]
    weight = sum(p[0].numel() * p.element_size() for p in modules[0].parameters())
    hidden_size = model.get_input_embeddings().weight.shape[1]
    rows = []
    for tokens in EXPERTS_TOKENS if model.device.type == "cuda" else (1, 16):
        for kept in (routers.model_top_k, routers.model_top_k // 2):
            hidden = torch.randn(tokens, hidden_size).to(model.device, model.dtype)
            index, weights = _planted(tokens, routers.num_experts, routers.model_top_k, kept)
            distinct = len(index[weights != 0].unique())
            index, weights = index.to(model.device), weights.to(model.device, model.dtype)

            def layers(
                hidden: Tensor = hidden, index: Tensor = index, weights: Tensor = weights
            ) -> None:
                for module in modules:
                    module(hidden, index, weights)

            watches = {}
            for name, function in ((NAME, sparse_experts_forward), ("grouped_mm", None)):
                with experts_by(model, name, function):
                    if tokens <= 64 and model.device.type == "cuda":
                        watches[name] = stopwatch(captured(layers), model.device)
                    else:
                        watches[name] = _by(model, name, function, layers)
            for name, time in _microseconds(time_interleaved(watches, rounds)).items():
                seconds = time["median"] / 1e6 / len(modules)
                rows.append(
                    {
                        "tokens": tokens,
                        "kept": kept,
                        "contender": name,
                        "distinct_experts": distinct,
                        "layer_us": {key: us / len(modules) for key, us in time.items()},
                        "bytes": distinct * weight,
                        "share_of_roof": distinct * weight / seconds / copied,
                    }
                )
    return rows


def _by(model: Any, name: str, function: Any, call: Any) -> Any:
    watch = stopwatch(call, model.device)

    def run() -> float:
        with experts_by(model, name, function):
            return watch()

    return run


def _planted(tokens: int, num_experts: int, slots: int, kept: int) -> tuple[Tensor, Tensor]:
    """Random experts, of which each token keeps the first few; the others name its first."""
    generator = torch.Generator().manual_seed(tokens)
    weights, index = torch.rand(tokens, num_experts, generator=generator).topk(slots, dim=-1)
    is_dropped = torch.arange(slots) >= kept
    return torch.where(is_dropped, index[:, :1], index), weights.masked_fill(is_dropped, 0.0)
