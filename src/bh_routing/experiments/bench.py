"""Measure speed: one part of a model, decoding, prefill, or a suite of experiments."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, Literal, get_args

import torch

from bh_routing.engine.bench_decode import bench_decode, bench_prefill
from bh_routing.engine.bench_kernels import bench_experts, bench_router
from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.decode import startup_seconds
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.timing import copied_bytes_per_second
from bh_routing.errors import InputError
from bh_routing.experiments.defaults import MAX_TOKENS, ROUTING_CONFIGS, TEST_PROMPTS
from bh_routing.experiments.experiment import Subject, run_experiment, warm_up
from bh_routing.experiments.provenance import device_name
from bh_routing.experiments.spec import Prompt, make_rules
from bh_routing.experiments.threads import choose_threads, torch_threads
from bh_routing.models.load import LoadedModel, load_model, resolve_device, resolve_dtype
from bh_routing.models.shapes import make_olmoe_shape

Part = Literal["router", "experts", "decode", "prefill", "suite"]
OLMOE_SHAPE: Final = "olmoe-shape"
PREFILL_TOKENS: Final = {"cuda": 4_096, "cpu": 512}


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSpec:
    """What to measure, and on what."""

    part: Part
    model: str | None = None
    """None: the shape of OLMoE-1B-7B with random weights on CUDA, the demo model on a CPU."""
    device: str = "auto"
    batches: tuple[int, ...] = (1,)
    tokens: int = 200
    rounds: int = 5
    is_compiled: bool = False
    """Also time transformers' compiled generation, whose start takes a minute or more."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.part not in get_args(Part):
            raise InputError(f"part must be one of {', '.join(get_args(Part))}; got {self.part!r}")
        if not self.batches or min(self.batches) < 1:
            raise InputError(f"batches must be numbers of at least 1, got {self.batches}")
        if self.tokens < 2 or self.rounds < 1:
            raise InputError(
                f"tokens must be at least 2 and rounds at least 1, got {self.tokens} and "
                f"{self.rounds}"
            )


def bench(spec: BenchSpec) -> dict[str, Any]:
    """Measure one part; the result is plain data with machine and versions.

    Raises:
        InputError: what is asked for isn't there.
        ModelError: the model can't be loaded, routed or decoded.
    """
    device = resolve_device(spec.device)
    start = time.perf_counter()
    model, tokenizer = _load(spec, device)
    loaded = time.perf_counter() - start
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    with torch_threads(choose_threads(device, num_parameters)):
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
        "model": spec.model or _default_model(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_sec": loaded,
        "copied_bytes_per_second": copied,
        "startup_sec": startup_seconds(model),
        "rows": rows,
    }


def _default_model(device: torch.device) -> str:
    return OLMOE_SHAPE if device.type == "cuda" else "demo"


def _load(spec: BenchSpec, device: torch.device) -> LoadedModel:
    name = spec.model or _default_model(device)
    if name == OLMOE_SHAPE:
        return make_olmoe_shape(device, resolve_dtype("auto", device))
    return load_model(name, device="cuda" if device.type == "cuda" else "cpu")


def _measure(spec: BenchSpec, model: Any, tokenizer: Any, copied: float) -> list[dict[str, Any]]:
    device = model.device.type
    match spec.part:
        case "router":
            return bench_router(model, rounds=spec.rounds)
        case "experts":
            return bench_experts(model, rounds=spec.rounds, copied=copied)
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
            return bench_prefill(model, tokens=PREFILL_TOKENS[device], rounds=spec.rounds)
        case "suite":
            return _bench_suite(model, tokenizer)


def _bench_suite(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Run the default configurations on the default prompts."""
    start = time.perf_counter()
    texts = [document.text for document in packaged_documents("calibration")]
    calibration = calibrate(model, tokenizer, texts, nulls=("background",))
    calibrate_sec = time.perf_counter() - start
    subject = Subject(model, tokenizer, calibration)
    rules = make_rules(ROUTING_CONFIGS)
    prompts = [Prompt(**prompt) for prompt in TEST_PROMPTS]
    start = time.perf_counter()
    for named_rule in rules:
        warm_up(subject, named_rule, prompts[0])
    warm_up_sec = time.perf_counter() - start
    start = time.perf_counter()
    records = [
        run_experiment(subject, named_rule, prompt, MAX_TOKENS).record
        for named_rule in rules
        for prompt in prompts
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
