"""Measure speed: decoding, prefill, or a suite of experiments, as `bh-routing bench` reports it.

Axes: B batch, S decode steps, L layers, K slots, P prompt positions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.decode import decode_greedily, engine_of, startup_seconds
from bh_routing.engine.generate import TokenClock
from bh_routing.engine.session import Session
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.timing import (
    Timing,
    copied_bytes_per_second,
    multiplied_per_second,
    stopwatch,
    time_interleaved,
)
from bh_routing.errors import InputError
from bh_routing.experiments.configurations import make_rules
from bh_routing.experiments.executors import choose_threads, torch_threads
from bh_routing.experiments.experiment import Subject, run_experiment, warm_up
from bh_routing.experiments.identity import device_name
from bh_routing.experiments.pass_cost import prefill_cost, step_cost
from bh_routing.experiments.preparation import Fitted, fit_to_loaded
from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.kernels.router import fused_router
from bh_routing.models.experts import experts_by
from bh_routing.models.load import LoadedModel, load_model, resolve_device, resolve_dtype
from bh_routing.models.routers import find_routers
from bh_routing.models.routing import bind_rule, install
from bh_routing.models.shapes import make_olmoe_shape
from bh_routing.models.trace import DROPPED
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.fixed import TopK

PROMPT_TOKENS: Final = 128
MEAN_TOLERANCE: Final = 0.05
MOST_TRIALS: Final = 12
TRANSFORMERS_DEFAULT: Final = "grouped_mm"
OLMOE_SHAPE: Final = "olmoe-shape"
PREFILL_TOKENS: Final = {"cuda": (16, 128, 1_024, 4_096), "cpu": (16, 128, 512)}
Row = dict[str, Any]
Part = Literal["decode", "prefill", "suite"]


def random_tokens(model: Any, batch: int, length: int, seed: int = 0) -> Tensor:
    """Draw sequences of random tokens, int64 (B, P) on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return torch.randint(2, vocabulary, (batch, length), generator=generator).to(model.device)


def rule_at_mean(mean_of: Callable[[Rule], float], mean_experts: float, max_k: int) -> Rule:
    """Find BH's alpha for a mean number of kept experts, under the Gaussian null distribution.

    The generated text depends on alpha too, so the mean jumps: the closest alpha tried is returned.
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
    """Time the generation of `tokens` tokens after a prompt of PROMPT_TOKENS random tokens.

    Args:
        model: not inside `route`.
        batches: batch sizes.
        tokens: tokens generated per sequence.
        rounds: timed rounds.
        copied: memory bandwidth of a copy, in bytes per second.
        is_compiled: also time transformers' static cache with compilation, at batch size 1.
    """
    top_k = find_routers(model).model_top_k
    engine = engine_of(model)
    rows = []
    for batch in batches:
        prompt = random_tokens(model, batch, PROMPT_TOKENS)

        def mean_of(rule: Rule, prompt: Tensor = prompt) -> float:
            is_kept_SLBK = _kept(model, rule, prompt, tokens) != DROPPED
            return float(is_kept_SLBK.sum(-1).float().mean())

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
        for name, timing in time_interleaved(runs, rounds).items():
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
    traces = decode_greedily(model, prompt.tolist(), rule, max_new_tokens=tokens).traces
    return torch.stack([trace.kept_index[prompt.shape[1] :] for trace in traces], dim=2)


def _engine_run(model: Any, prompt: Tensor, rule: Rule, tokens: int) -> Callable[[], float]:
    session = _session(model, rule, prompt, tokens)
    prompts = prompt.tolist()

    @torch.inference_mode()
    def run() -> float:
        session.start(prompts)
        return session.run(tokens - 1).seconds / (tokens - 1)

    return run


def _session(model: Any, rule: Rule, prompt: Tensor, tokens: int) -> Session:
    engine, longest = engine_of(model), prompt.shape[1]
    # The last token isn't fed back.
    length = longest + tokens - 1
    return engine.session(engine.bind(model, rule, None), len(prompt), length, longest)


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
def bench_prefill(
    model: Any, *, lengths: Sequence[int], rounds: int, copied: float, multiplied: float
) -> list[Row]:
    """Time the forward pass over a prompt of random tokens, up to its first generated token.

    Args:
        model: not inside `route`.
        lengths: numbers of tokens.
        rounds: timed rounds.
        copied: memory bandwidth of a copy, in bytes per second.
        multiplied: operations per second of a matrix product.
    """
    top_k = find_routers(model).model_top_k
    rows = []
    for tokens in lengths:
        prompt = random_tokens(model, 1, tokens)
        mask = torch.ones_like(prompt)

        def plain(prompt: Tensor = prompt, mask: Tensor = mask) -> None:
            model(input_ids=prompt, attention_mask=mask, use_cache=True, logits_to_keep=1)

        def mean_of(rule: Rule, plain: Callable[[], None] = plain) -> float:
            with install(model, bind_rule(model, rule, fuse=fused_router)) as trace:
                plain()
            return float(trace.expert_counts.float().mean())

        rules = {
            f"engine, top-k {top_k}": TopK(top_k),
            f"engine, bh {top_k // 2}": rule_at_mean(mean_of, top_k / 2, top_k),
        }
        sessions = {name: _session(model, rule, prompt, 1) for name, rule in rules.items()}
        kept = {name: _prompt_kept(session, prompt) for name, session in sessions.items()}
        runs = {name: _prefill_run(session, prompt) for name, session in sessions.items()}
        runs["transformers"] = _transformers_run(model, plain)
        for name, timing in time_interleaved(runs, rounds).items():
            own = kept.get(name, kept[f"engine, top-k {top_k}"])
            cost = prefill_cost(engine_of(model).decoder, own)
            roof = max(cost.bytes / copied, tokens * cost.flops_per_token / multiplied)
            rows.append(
                {
                    "tokens": tokens,
                    "contender": name,
                    "pass_ms": _milliseconds(timing),
                    "roof_ms": 1000 * roof,
                    **cost._asdict(),
                    "share_of_roof": roof / timing.median_sec,
                }
            )
    return rows


def _prompt_kept(session: Session, prompt: Tensor) -> Tensor:
    session.start(prompt.tolist())
    return session.state.kept_PLBK[: prompt.shape[1], :, 0]


def _prefill_run(session: Session, prompt: Tensor) -> Callable[[], float]:
    prompts = prompt.tolist()
    return stopwatch(lambda: session.start(prompts), prompt.device)


def _transformers_run(model: Any, forward: Callable[[], None]) -> Callable[[], float]:
    watch = stopwatch(forward, model.device)

    def run() -> float:
        with experts_by(model, TRANSFORMERS_DEFAULT):
            return watch()

    return run


def _milliseconds(timing: Timing) -> dict[str, float]:
    times = {"median": timing.median_sec, "low": timing.low_sec, "high": timing.high_sec}
    return {name: 1000 * seconds for name, seconds in times.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSpec:
    """The part to measure, and the model to measure it on."""

    part: Part
    model: str | None = None
    """None: the shape of OLMoE-1B-7B with random weights on CUDA, the demo model on a CPU."""
    device: str = "auto"
    batches: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = ()
    """Prompt lengths of part prefill; empty: PREFILL_TOKENS."""
    tokens: int = 200
    rounds: int = 5
    is_compiled: bool = False
    """Also time transformers' compiled generation, which takes a minute or more to compile."""

    def __post_init__(self) -> None:
        """Reject values out of range."""
        if self.part not in get_args(Part):
            raise InputError(f"part must be one of {', '.join(get_args(Part))}; got {self.part!r}")
        for name, sizes in (("batches", self.batches), ("lengths", self.lengths or (1,))):
            if not sizes or min(sizes) < 1:
                raise InputError(f"{name} must be numbers of at least 1, got {sizes}")
        if self.tokens < 2 or self.rounds < 1:
            raise InputError(
                f"tokens must be at least 2 and rounds at least 1, got {self.tokens} and "
                f"{self.rounds}"
            )


def bench(spec: BenchSpec) -> dict[str, Any]:
    """Measure one part and return plain data, with the machine and library versions.

    Raises:
        InputError: the device or the model isn't available.
        ModelError: the model can't be loaded, routed or decoded.
    """
    device = resolve_device(spec.device)
    name = spec.model or (OLMOE_SHAPE if device.type == "cuda" else "demo")
    start = time.perf_counter()
    model, tokenizer = _load(name, device)
    loaded = time.perf_counter() - start
    with torch_threads(choose_threads(model).decode):
        threads = torch.get_num_threads()
        copied = copied_bytes_per_second(device)
        rows = _measure(spec, model, tokenizer, copied)
    return {
        "part": spec.part,
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": threads,
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_sec": loaded,
        "copied_bytes_per_second": copied,
        "startup_sec": startup_seconds(model),
        "rows": rows,
    }


def _load(name: str, device: torch.device) -> LoadedModel:
    if name == OLMOE_SHAPE:
        return make_olmoe_shape(device, resolve_dtype("auto", device))
    return load_model(name, device="cuda" if device.type == "cuda" else "cpu")


def _measure(spec: BenchSpec, model: Any, tokenizer: Any, copied: float) -> list[dict[str, Any]]:
    device = model.device.type
    match spec.part:
        case "decode":
            return bench_decode(
                model,
                batches=spec.batches,
                tokens=spec.tokens,
                rounds=spec.rounds,
                copied=copied,
                is_compiled=spec.is_compiled and device == "cuda",
            )
        case "prefill":
            return bench_prefill(
                model,
                lengths=spec.lengths or PREFILL_TOKENS[device],
                rounds=spec.rounds,
                copied=copied,
                multiplied=multiplied_per_second(model.device, model.dtype),
            )
        case "suite":
            return _bench_suite(model, tokenizer)


def _bench_suite(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Run the default configurations on the default prompts."""
    start = time.perf_counter()
    texts = [document.text for document in packaged_documents("calibration")]
    subject = Subject(model, tokenizer, calibrate(model, tokenizer, texts, nulls=("background",)))
    calibrate_sec = time.perf_counter() - start
    spec = fit_to_loaded(Fitted(make_spec(RunSpec), {}), model).spec
    rules = make_rules(spec.configs)
    start = time.perf_counter()
    for named_rule in rules:
        warm_up(subject, named_rule, spec.prompts[0])
    warm_up_sec = time.perf_counter() - start
    start = time.perf_counter()
    records = [
        run_experiment(subject, named_rule, prompt, spec.max_tokens).record
        for named_rule in rules
        for prompt in spec.prompts
    ]
    wall_sec = time.perf_counter() - start
    return [
        {
            "experiments": len(records),
            "compute_sec": sum(record.inference_time_sec for record in records),
            "prefill_sec": sum(record.prefill_time_sec for record in records),
            "decode_sec": sum(record.decode_time_sec for record in records),
            "wall_sec": wall_sec,
            "warm_up_sec": warm_up_sec,
            "calibrate_sec": calibrate_sec,
            "tokens": sum(record.num_output_tokens for record in records),
        }
    ]
