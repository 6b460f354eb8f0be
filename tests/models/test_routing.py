"""Routing changes what it says it changes, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bh_routing.engine.generate import generate_greedy
from bh_routing.errors import CalibrationError, InputError, ModelError
from bh_routing.models import LoadedModel, find_routers, load_model, model_fingerprint, route
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.drop import BenjaminiHochbergDrop
from bh_routing.rules.fixed import TopK

PROMPT = "The old man walked down to the river and"
IMPLEMENTATIONS = ("bh_sparse", "eager", "batched_mm", "grouped_mm")


def logits_of(demo: LoadedModel, inputs: dict[str, Any]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = demo.model(**inputs).logits
    return logits


@contextmanager
def experts_implementation(model: Any, name: str) -> Iterator[None]:
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keeping_everything_gives_bit_identical_logits(
    demo: LoadedModel, demo_inputs: dict[str, Any], implementation: str
) -> None:
    with experts_implementation(demo.model, implementation):
        plain = logits_of(demo, demo_inputs)
        with route(demo.model, TopK(k=8)):
            routed = logits_of(demo, demo_inputs)
    assert torch.equal(plain, routed)


def test_top_8_generates_what_plain_generate_does(
    demo: LoadedModel, demo_inputs: dict[str, Any]
) -> None:
    prompt = PROMPT
    plain = demo.model.generate(
        **demo_inputs,
        max_new_tokens=30,
        do_sample=False,
        pad_token_id=demo.tokenizer.pad_token_id,
    )
    with route(demo.model, TopK(k=8)):
        ours = generate_greedy(demo.model, demo.tokenizer, prompt, 30)
    assert ours.token_ids == plain[0, demo_inputs["input_ids"].shape[1] :].tolist()
    assert ours.inference_time_sec == pytest.approx(ours.prefill_time_sec + ours.decode_time_sec)


def test_leaving_the_context_restores_bitwise_equal_logits(
    demo: LoadedModel, demo_inputs: dict[str, Any], demo_calibration: Calibration
) -> None:
    before = logits_of(demo, demo_inputs)
    with route(demo.model, BenjaminiHochberg(alpha=0.05, max_k=10), demo_calibration):
        inside = logits_of(demo, demo_inputs)
    assert not torch.equal(before, inside)
    assert torch.equal(before, logits_of(demo, demo_inputs))


def test_an_error_inside_the_context_restores_the_model(
    demo: LoadedModel, demo_inputs: dict[str, Any]
) -> None:
    before = logits_of(demo, demo_inputs)
    with pytest.raises(RuntimeError, match="boom"), route(demo.model, TopK(k=2)):
        raise RuntimeError("boom")
    assert torch.equal(before, logits_of(demo, demo_inputs))


def test_pruning_equals_the_model_with_its_own_smaller_top_k(
    demo: LoadedModel, demo_inputs: dict[str, Any]
) -> None:
    routers: list[Any] = [site.module for site in find_routers(demo.model).sites]
    with route(demo.model, TopK(k=3)) as trace:
        pruned = logits_of(demo, demo_inputs)
    for router in routers:
        router.top_k = 3
    try:
        own = logits_of(demo, demo_inputs)
    finally:
        for router in routers:
            router.top_k = 8
    torch.testing.assert_close(pruned, own, rtol=1e-5, atol=1e-5)
    assert set(trace.expert_counts.flatten().tolist()) == {3}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_that_no_token_kept_are_never_read(
    demo_inputs: dict[str, Any], implementation: str
) -> None:
    demo = load_model("demo", device="cpu")  # a copy of its own: its weights are poisoned
    demo.model.set_experts_implementation(implementation)
    with route(demo.model, TopK(k=1)) as trace:
        clean = logits_of(demo, demo_inputs)
    for layer, block in enumerate(demo.model.model.layers):
        unused = trace.utilization[layer] == 0
        assert unused.any()
        block.mlp.experts.gate_up_proj.data[unused] = float("nan")
        block.mlp.experts.down_proj.data[unused] = float("nan")
    with route(demo.model, TopK(k=1)):
        poisoned = logits_of(demo, demo_inputs)
    assert torch.equal(clean, poisoned)


def test_widening_keeps_the_models_own_experts_and_adds_to_them(
    demo: LoadedModel, demo_inputs: dict[str, Any]
) -> None:
    with route(demo.model, TopK(k=8)) as own:
        logits_of(demo, demo_inputs)
    with route(demo.model, TopK(k=10)) as wide:
        logits_of(demo, demo_inputs)
    assert set(wide.expert_counts.flatten().tolist()) == {10}
    # Only the first layer sees the same hidden states in both runs.
    for narrow, wider in zip(own.kept_index[:, 0], wide.kept_index[:, 0], strict=True):
        assert wider[:8].tolist() == narrow.tolist()


def test_counts_stay_between_min_k_and_max_k_and_some_exceed_the_models_own(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    rule = BenjaminiHochberg(alpha=0.03, temperature=1.5, min_k=2, max_k=10)
    inputs = demo.tokenizer("Photosynthesis is the process by which plants " * 8)
    with route(demo.model, rule, demo_calibration) as trace:
        logits_of(demo, {"input_ids": torch.tensor([inputs["input_ids"]])})
    counts = trace.expert_counts
    assert 2 <= counts.min() < 8 < counts.max() <= 10


def test_the_trace_has_a_row_a_token_and_a_column_a_layer(
    demo: LoadedModel, demo_inputs: dict[str, Any], demo_calibration: Calibration
) -> None:
    prompt = PROMPT
    with route(demo.model, BenjaminiHochberg(alpha=0.05), demo_calibration) as trace:
        generation = generate_greedy(demo.model, demo.tokenizer, prompt, 5)
    prompt_tokens = generation.num_input_tokens
    assert trace.forward_tokens == [prompt_tokens, 1, 1, 1, 1]
    assert trace.expert_counts.shape == (prompt_tokens + 4, 6)
    assert trace.utilization.shape == (6, 64)
    assert torch.equal(trace.utilization.sum(-1), trace.expert_counts.sum(0))
    assert trace.expert_counts.min() < trace.expert_counts.max()


class _CountHostSyncs(TorchDispatchMode):
    """Count the operations that make the host wait for the device."""

    SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += any(name in func.name() for name in self.SYNCS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [TopK(k=4), BenjaminiHochberg(alpha=0.05, temperature=2.0)])
def test_a_rule_adds_no_host_sync(
    demo: LoadedModel, demo_inputs: dict[str, Any], demo_calibration: Calibration, rule: Rule
) -> None:
    # The eager experts loop syncs as often as experts are hit; batched_mm doesn't.
    with experts_implementation(demo.model, "batched_mm"):
        with _CountHostSyncs() as plain:
            demo.model(input_ids=demo_inputs["input_ids"], use_cache=False)
        with route(demo.model, rule, demo_calibration), _CountHostSyncs() as routed:
            demo.model(input_ids=demo_inputs["input_ids"], use_cache=False)
    assert routed.count == plain.count


def test_nesting_is_refused(demo: LoadedModel) -> None:
    with (
        route(demo.model, TopK(k=8)),
        pytest.raises(ModelError, match="already inside route"),
        route(demo.model, TopK(k=4)),
    ):
        pass


@pytest.mark.parametrize(
    ("rule", "null"),
    [
        (BenjaminiHochberg(alpha=0.05), "background"),
        (BenjaminiHochbergDrop(alpha=0.05), "needed_by_loss"),
    ],
)
def test_a_rule_that_needs_a_calibration_says_so_before_anything_runs(
    demo: LoadedModel, rule: Rule, null: str
) -> None:
    with (
        pytest.raises(CalibrationError, match=rf"null '{null}' .*rules=\[rule\]"),
        route(demo.model, rule),
    ):
        pytest.fail("the block ran")


def test_a_calibration_of_another_model_is_refused(demo_calibration: Calibration) -> None:
    other = load_model("demo", device="cpu")
    with torch.no_grad():
        other.model.lm_head.weight.add_(1.0)
    assert model_fingerprint(other.model) != demo_calibration.model_fingerprint
    with (
        pytest.raises(CalibrationError, match="model"),
        route(other.model, BenjaminiHochberg(alpha=0.05), demo_calibration),
    ):
        pytest.fail("the block ran")


def test_more_experts_than_the_model_has_are_refused(demo: LoadedModel) -> None:
    with pytest.raises(InputError, match="64"), route(demo.model, TopK(k=65)):
        pytest.fail("the block ran")


def test_temperature_keeps_the_mass_of_the_kept_slots(
    demo: LoadedModel, demo_inputs: dict[str, Any]
) -> None:
    router = find_routers(demo.model).sites[0].module
    seen: list[Tensor] = []
    for temperature in (1.0, 2.0):
        with route(demo.model, TopK(k=8, temperature=temperature)):
            handle = router.register_forward_hook(lambda _, __, output: seen.append(output[1]))
            logits_of(demo, demo_inputs)
            handle.remove()
    plain, flat = seen
    torch.testing.assert_close(plain.sum(-1), flat.sum(-1))
    assert (flat.amax(-1) < plain.amax(-1)).all()
