"""Time decoding and prefill: the engine beside transformers' own, Top-K beside BH."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from bh_routing.engine.bench_cost import step_cost
from bh_routing.engine.decode import decode_greedily, engine_of
from bh_routing.engine.generate import TokenClock
from bh_routing.engine.quickest import bind_quickest
from bh_routing.engine.timing import Timing, stopwatch, time_interleaved
from bh_routing.kernels.experts import NAME, sparse_experts_forward
from bh_routing.models.backends import experts_by
from bh_routing.models.discovery import find_routers
from bh_routing.models.routing import install
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.top_k import TopK

PROMPT_TOKENS: Final = 128
MEAN_TOLERANCE: Final = 0.05
MOST_TRIALS: Final = 12
TRANSFORMERS_DEFAULT: Final = "grouped_mm"
Row = dict[str, Any]


def random_tokens(model: Any, batch: int, length: int, seed: int = 0) -> Tensor:
    """Draw texts of random tokens, int64 (B, P) on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return torch.randint(2, vocabulary, (batch, length), generator=generator).to(model.device)


def rule_at_mean(mean_of: Callable[[Rule], float], mean_experts: float, max_k: int) -> Rule:
    """Find BH's alpha at which about a mean number of experts is kept, under the Gaussian null.

    What a model writes depends on alpha too, so its mean jumps: the closest that was met is taken.
    """
    low, high = 0.0, 1.0
    closest: tuple[float, Rule] | None = None
    for _ in range(MOST_TRIALS):
        alpha = (low + high) / 2
        rule = BenjaminiHochberg(alpha=alpha, max_k=max_k, null="gaussian")
        mean = mean_of(rule)
        miss = abs(mean - mean_experts)
        if closest is None or miss < closest[0]:
            closest = miss, rule
        if miss <= MEAN_TOLERANCE:
            break
        low, high = (alpha, high) if mean < mean_experts else (low, alpha)
    assert closest is not None
    return closest[1]


def bench_decode(
    model: Any,
    *,
    batches: Sequence[int],
    tokens: int,
    rounds: int,
    copied: float,
    is_compiled: bool,
) -> list[Row]:
    """Time the writing of `tokens` tokens after a prompt of PROMPT_TOKENS random ones.

    Args:
        model: not inside `route`.
        batches: numbers of texts written side by side.
        tokens: written for each text.
        rounds: that count.
        copied: bytes a second that a copy moves.
        is_compiled: also time transformers' static cache with compilation, for one text.
    """
    top_k = find_routers(model).model_top_k
    engine = engine_of(model)
    rows = []
    for batch in batches:
        prompt = random_tokens(model, batch, PROMPT_TOKENS)

        def decode(rule: Rule, length: int = tokens, prompt: Tensor = prompt) -> Any:
            return decode_greedily(model, prompt, rule, max_new_tokens=length)

        def mean_of(rule: Rule, decode: Any = decode, skipped: int = prompt.numel()) -> float:
            counts_TL = decode(rule).trace.expert_counts
            return float(counts_TL[skipped:].float().mean())

        rules: dict[str, Rule] = {
            f"top-k {top_k}": TopK(top_k),
            f"top-k {top_k // 2}": TopK(top_k // 2),
            f"bh {top_k // 2}": rule_at_mean(mean_of, top_k / 2, top_k),
        }

        runs = {
            f"engine, {name}": _engine_run(model, prompt, rule, tokens)
            for name, rule in rules.items()
        }
        if batch == 1:
            runs["generate"] = _generate_run(model, prompt, tokens)
            if is_compiled:
                runs["generate, static cache, compiled"] = _generate_run(
                    model, prompt, tokens, cache_implementation="static"
                )
        timings = time_interleaved(runs, rounds)
        for name, timing in timings.items():
            rule = rules.get(name.removeprefix("engine, "), TopK(top_k))
            kept = _kept(model, rule, prompt, tokens)
            cost = step_cost(engine.decoder, kept, PROMPT_TOKENS + tokens / 2)
            rows.append(
                {
                    "batch": batch,
                    "contender": name,
                    "setting": str(rule) if name.startswith("engine, bh") else "",
                    "tokens_per_second": batch / timing.median_sec,
                    "step_ms": _milliseconds(timing),
                    **cost._asdict(),
                    "share_of_roof": cost.bytes / timing.median_sec / copied,
                }
            )
    return rows


def _kept(model: Any, rule: Rule, prompt: Tensor, tokens: int) -> Tensor:
    batch = len(prompt)
    kept_TLK: Tensor = decode_greedily(model, prompt, rule, max_new_tokens=tokens).trace.kept_index
    steps_TLK = kept_TLK[prompt.numel() :]
    kept_SLBK: Tensor = steps_TLK.unflatten(0, (-1, batch)).transpose(1, 2)
    return kept_SLBK


def _engine_run(model: Any, prompt: Tensor, rule: Rule, tokens: int) -> Callable[[], float]:
    """Prefill once: to hook a rule in throws away what transformers has compiled."""
    engine = engine_of(model)
    bound = engine.bind(model, rule, None)
    session = engine.session(bound, len(prompt), prompt.shape[1] + tokens)
    with torch.inference_mode(), install(model, bound):
        output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def run() -> float:
        position = session.start(output.past_key_values, output.logits[:, -1].argmax(-1))
        return session.run(position, tokens - 1, ()).seconds / (tokens - 1)

    return run


def _generate_run(model: Any, prompt: Tensor, tokens: int, **options: Any) -> Callable[[], float]:
    def run() -> float:
        clock = TokenClock()
        with experts_by(model, TRANSFORMERS_DEFAULT):
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
                **options,
            )
        return (clock.ticks[-1] - clock.ticks[1]) / (tokens - 1)

    return run


@torch.inference_mode()
def bench_prefill(model: Any, *, tokens: int, rounds: int) -> list[Row]:
    """Time one forward pass over a text of random tokens."""
    top_k = find_routers(model).model_top_k
    token_1P = random_tokens(model, 1, tokens)

    def forward() -> None:
        model(input_ids=token_1P, use_cache=True, logits_to_keep=1)

    def mean_of(rule: Rule) -> float:
        with install(model, bind_quickest(model, rule)) as trace:
            forward()
        return float(trace.expert_counts.float().mean())

    bh = rule_at_mean(mean_of, top_k / 2, top_k)
    means = {"": float(top_k), "top-k": float(top_k), "bh": mean_of(bh)}

    def routed(rule: Rule, implementation: str) -> Callable[[], float]:
        bound = bind_quickest(model, rule)
        watch = stopwatch(forward, model.device)

        def run() -> float:
            with _experts(model, implementation), install(model, bound):
                return watch()

        return run

    def plain(implementation: str) -> Callable[[], float]:
        watch = stopwatch(forward, model.device)

        def run() -> float:
            with _experts(model, implementation):
                return watch()

        return run

    runs = {
        f"transformers, {TRANSFORMERS_DEFAULT}": plain(TRANSFORMERS_DEFAULT),
        "top-k, bh_sparse": routed(TopK(top_k), NAME),
        "bh, bh_sparse": routed(bh, NAME),
        f"bh, {TRANSFORMERS_DEFAULT}": routed(bh, TRANSFORMERS_DEFAULT),
    }
    rows = []
    for name, timing in time_interleaved(runs, rounds).items():
        rule_name = name.split(", ")[0]
        rows.append(
            {
                "tokens": tokens,
                "contender": name,
                "mean_experts": means.get(rule_name, float(top_k)),
                "pass_ms": _milliseconds(timing),
                "tokens_per_second": tokens / timing.median_sec,
            }
        )
    return rows


def _experts(model: Any, implementation: str) -> Any:
    return experts_by(
        model, implementation, sparse_experts_forward if implementation == NAME else None
    )


def _milliseconds(timing: Timing) -> dict[str, float]:
    return {
        "median": 1000 * timing.median_sec,
        "low": 1000 * timing.low_sec,
        "high": 1000 * timing.high_sec,
    }
