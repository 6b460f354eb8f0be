"""The vLLM plugin: binds a configured rule to every mixture-of-experts layer of a loaded model.

vLLM calls `register` in each of its processes. Without a configuration nothing else changes: the
model runs vLLM's own code.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from bh_routing.errors import BHRoutingError
from bh_routing.experiments.configurations import rule_text
from bh_routing.experiments.spec_errors import name_commands
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.contributions import OF_SLOTS
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.serving.checks import (
    check_engine,
    check_finite,
    check_model,
    check_rules,
    find_layers,
)
from bh_routing.serving.config import ServedRule, config_of
from bh_routing.serving.layer import ServedLayer, StepRows, routing_of
from bh_routing.serving.telemetry import Telemetry, log


def register() -> None:
    """Install the plugin in this process; called more than once, it does so once.

    Raises:
        SystemExit: the configuration is invalid; the message says why.
    """
    _or_exit(lambda: config_of(None))
    _wrap(VllmConfig, "compute_hash", _hash_with_rule)
    loaders = [BaseModelLoader, *_subclasses(BaseModelLoader)]
    for loader in loaders:
        if "load_model" in vars(loader):
            _wrap(loader, "load_model", _load_and_bind)


def _subclasses(kind: Any) -> Iterator[Any]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around(method, self, *args, **kwargs)`, once."""
    own = getattr(owner, name)
    if getattr(own, "_bh_routing", False):
        return

    @functools.wraps(own)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(own, *args, **kwargs)

    setattr(wrapped, "_bh_routing", True)  # noqa: B010  # mypy doesn't know the attribute
    setattr(owner, name, wrapped)


def _or_exit(work: Callable[[], Any]) -> Any:
    """Do the work; an error of ours ends the process with its sentence, not with a traceback."""
    try:
        return work()
    except BHRoutingError as error:
        raise SystemExit(f"bh-routing: {name_commands(str(error))}") from None


def _hash_with_rule(own: Callable[..., str], config: Any, *args: Any, **kwargs: Any) -> str:
    """Return vLLM's key of compiled code, which also depends on the rule."""
    key = own(config, *args, **kwargs)
    served = _or_exit(lambda: config_of(config.additional_config))
    if served is None:
        return key
    return hashlib.sha256(f"{key} {served.digest}".encode()).hexdigest()[: len(key)]


def _load_and_bind(own: Callable[..., Any], loader: Any, *args: Any, **kwargs: Any) -> Any:
    arguments = inspect.signature(own).bind(loader, *args, **kwargs).arguments
    vllm_config = arguments["vllm_config"]
    served = _or_exit(lambda: config_of(vllm_config.additional_config))
    if served is None:
        return own(loader, *args, **kwargs)
    _or_exit(lambda: check_engine(vllm_config))
    model = own(loader, *args, **kwargs)
    _or_exit(lambda: bind(model, vllm_config, served))
    return model


def bind(model: nn.Module, vllm_config: Any, served: ServedRule) -> None:
    """Bind a rule to every mixture-of-experts layer of a loaded model.

    Raises:
        InputError, CalibrationError: the rule doesn't fit the model.
        ModelError: a router of the model isn't supported, or weights or logits aren't finite.
    """
    layers = find_layers(model)
    check_model(model, vllm_config, layers)
    num_experts, top_k = layers[0].router.global_num_experts, layers[0].router.top_k
    check_rules(served, layers)
    check_finite(model, vllm_config, layers)
    scheduler = vllm_config.scheduler_config
    device = next(model.parameters()).device
    max_rows = scheduler.max_num_batched_tokens
    rows = StepRows(max_rows, min(max_rows, scheduler.max_num_seqs), device)
    shape = (len(layers), max_rows, top_k)
    record_LTK = torch.zeros(shape, dtype=torch.int32, device=device)
    for number, layer in enumerate(layers):
        common = LayerContext(
            layer=number,
            num_experts=num_experts,
            model_top_k=top_k,
            device=device,
            num_layers=len(layers),
        )
        prefill = served.prefill_rule
        bound = ServedLayer(
            served.rule,
            _calibrated(common, served.rule, served.calibration),
            None
            if prefill is None
            else prefill.bind(_calibrated(common, prefill, served.calibration)),
            normalises=bool(layer.router.renormalize),
            rows=rows,
            record_TK=record_LTK[number],
        )
        layer.router._compute_routing = routing_of(layer.router._compute_routing, number, bound)
    text = rule_text(served.rule) or served.rule.method
    is_first = get_tensor_model_parallel_rank() == 0
    _WATCHERS["model"] = Watcher(
        rows if served.rule.unit == "step" else None,
        Telemetry(record_LTK, text) if is_first else None,
    )
    _watch_steps(vllm_config.use_v2_model_runner)
    log.info("rule %s is bound to %d layers, by %s", text, len(layers), bound.implementation)
    if served.rule.unit == "step" and vllm_config.cache_config.enable_prefix_caching:
        log.warning(
            "the prefix cache keeps results that depended on the other requests of a decode step, "
            "and later requests read them; --no-enable-prefix-caching turns it off"
        )


def _calibrated(context: LayerContext, rule: Rule, calibration: Calibration | None) -> LayerContext:
    """Return the context with the references that the rule needs."""
    if calibration is None or rule.required_null is None:
        return context
    if rule.required_null in OF_SLOTS:
        return replace(context, contributions=calibration.contributions)
    table = calibration.table(rule.required_null, context.layer)
    return replace(context, table=table.to(context.device))


class Watcher(NamedTuple):
    """Objects that are told about each forward pass before it starts."""

    rows: StepRows | None
    """For a rule by decode step."""
    telemetry: Telemetry | None
    """On the first rank."""

    def announce(self, find: Callable[[], NDArray[np.bool_]]) -> None:
        """Announce a forward pass.

        Args:
            find: returns which of its rows decode.
        """
        is_due = self.telemetry is not None and self.telemetry.is_due
        is_decode_T = find() if self.rows is not None or is_due else None
        if self.telemetry is not None:
            self.telemetry.begin(is_decode_T if is_due else None)
        if self.rows is not None and is_decode_T is not None:
            self.rows.set(is_decode_T)


_WATCHERS: Final[dict[str, Watcher]] = {}
"""The watcher of this process's model; empty without a rule."""


def _watch_steps(use_v2_model_runner: bool) -> None:
    """Announce each forward pass of vLLM's model runner to the process's watcher."""
    # Imported here: only processes that run a model can.
    if use_v2_model_runner:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        _wrap(GPUModelRunner, "prepare_inputs", _announce_v2)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as GPUModelRunnerV1

        _wrap(GPUModelRunnerV1, "_model_forward", _announce_v1)


def _announce_v1(own: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    for watcher in _WATCHERS.values():
        watcher.announce(lambda: decode_rows_v1(runner))
    return own(runner, *args, **kwargs)


def _announce_v2(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    batch = own(*args, **kwargs)
    for watcher in _WATCHERS.values():
        watcher.announce(lambda: decode_rows_v2(batch))
    return batch


def decode_rows_v1(runner: Any) -> NDArray[np.bool_]:
    """Return which rows of a V1 runner's batch decode: all others are prompt tokens."""
    batch, count = runner.input_batch, runner.input_batch.num_reqs
    lengths_R = np.diff(runner.query_start_loc.np[: count + 1])
    is_done_R = batch.num_computed_tokens_cpu[:count] >= batch.num_prompt_tokens[:count]
    # One row that isn't a prompt's last: a preempted request computes its own tokens in chunks.
    return np.repeat((lengths_R == 1) & is_done_R, lengths_R)


def decode_rows_v2(batch: Any) -> NDArray[np.bool_]:
    """Return which rows of a V2 runner's batch decode."""
    count = batch.num_reqs
    lengths_R = np.diff(batch.query_start_loc_np[: count + 1])
    return np.repeat((lengths_R == 1) & ~batch.is_prefilling_np[:count], lengths_R)
