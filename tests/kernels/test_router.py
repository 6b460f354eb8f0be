"""The fused router agrees with its reference implementation, on a GPU or by Triton's interpreter.

Axes: T tokens, E experts, K slots.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bh_routing.errors import CalibrationError, InputError
from bh_routing.kernels.router import fused_router
from bh_routing.rules import (
    BenjaminiHochberg,
    BenjaminiHochbergDrop,
    ContributionThreshold,
    Entropy,
    FloorThreshold,
    HigherCriticism,
    MinP,
    PerLayerTopK,
    Rule,
    Threshold,
    TopK,
    TopP,
)
from bh_routing.rules.router import RoutedSlots, SoftmaxFamily, reference_router
from tests.rules.proposals import context_for, random_logits

NUM_TOKENS = {"cpu": 41, "cuda": 5_001}
RAW, NORMALISED = SoftmaxFamily(normalises=False), SoftmaxFamily(normalises=True)
# bfloat16 logits as a model's linear layer gives them, with the ties that come with 8 bits; the
# weights stay float32 because the interpreter, unlike a GPU, cuts a bfloat16 off.
FINE = SoftmaxFamily(normalises=False, weights_dtype=torch.float32)
RULES: list[Rule] = [
    TopK(3),
    TopK(12),
    PerLayerTopK((5,)),
    BenjaminiHochberg(0.05),
    BenjaminiHochberg(0.03, min_k=2, max_k=10, procedure="by", on_empty="model_k"),
    BenjaminiHochberg(0.05, null="gaussian", on_empty="model_k", max_k=4),
    BenjaminiHochberg(0.10, null="background_studentized"),
    BenjaminiHochbergDrop(0.2, statistic="contribution"),
    BenjaminiHochbergDrop(0.5, statistic="weight", min_k=3),
    BenjaminiHochbergDrop(0.4, scope="population"),
    ContributionThreshold(0.03, min_k=2),
    TopP(0.6),
    MinP(0.2),
    FloorThreshold(3, 0.4),
    Threshold(0.1),
    HigherCriticism(2.0, max_k=10),
]


def route_both(
    rule: Rule,
    logits_TE: Tensor,
    device: str,
    family: SoftmaxFamily = FINE,
    model_top_k: int = 8,
) -> tuple[RoutedSlots, RoutedSlots]:
    """The fused router's slots and the reference's."""
    context = context_for(rule, logits_TE.shape[-1], model_top_k, device)
    fused = fused_router(rule, context, family)
    assert fused is not None
    logits_TE = logits_TE.to(device)
    return fused(logits_TE), reference_router(rule, context, family)(logits_TE)


def assert_same(fused: RoutedSlots, reference: RoutedSlots) -> None:
    """Bit for bit; the weights only on a GPU, where both have the same `exp`."""
    assert torch.equal(fused.expert_counts_T, reference.expert_counts_T)
    assert torch.equal(fused.keep_TK, reference.keep_TK)
    assert torch.equal(fused.top_k_index_TK, reference.top_k_index_TK)
    tolerance = (
        0.0 if fused.keep_TK.is_cuda else 4 * torch.finfo(reference.top_k_weights_TK.dtype).eps
    )
    torch.testing.assert_close(
        fused.top_k_weights_TK, reference.top_k_weights_TK, rtol=tolerance, atol=0.0
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_kernel_decides_like_its_reference(rule: Rule, device: str) -> None:
    fused, reference = route_both(rule, random_logits(NUM_TOKENS[device]).bfloat16(), device)
    assert_same(fused, reference)
    if not isinstance(rule, TopK | PerLayerTopK):
        assert 1 <= reference.expert_counts_T.min() < reference.expert_counts_T.max()


@pytest.mark.parametrize(
    ("num_experts", "num_slots"), [(8, 2), (12, 12), (60, 6), (128, 1), (160, 8), (512, 32)]
)
def test_any_number_of_experts_and_slots(num_experts: int, num_slots: int, device: str) -> None:
    rule = BenjaminiHochberg(0.2, null="gaussian", max_k=num_slots)
    logits_TE = random_logits(NUM_TOKENS[device], num_experts)
    assert_same(*route_both(rule, logits_TE.half(), device, NORMALISED, model_top_k=num_slots))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_every_dtype(dtype: torch.dtype, device: str) -> None:
    rule = BenjaminiHochbergDrop(0.3, statistic="contribution")
    assert_same(*route_both(rule, random_logits(NUM_TOKENS[device]).to(dtype), device))


@pytest.mark.parametrize("family", [RAW, NORMALISED], ids=["raw", "normalised"])
@pytest.mark.parametrize("weights", ["model", "renormalize", "preserve_mass"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_convention_of_weights(
    family: SoftmaxFamily, weights: str, temperature: float, device: str
) -> None:
    rule = BenjaminiHochberg(0.05, max_k=10, weights=weights, temperature=temperature)  # type: ignore[arg-type]
    fused, reference = route_both(rule, random_logits(NUM_TOKENS[device]), device, family)
    assert torch.equal(fused.top_k_index_TK, reference.top_k_index_TK)
    torch.testing.assert_close(
        fused.top_k_weights_TK, reference.top_k_weights_TK, rtol=2e-6, atol=1e-30
    )


def test_equal_logits_go_to_the_smaller_expert_number_and_zeros_have_no_sign(device: str) -> None:
    logits_TE = torch.tensor([[0.0, 1.0, -0.0, 1.0, 0.0, -2.0, -0.0, 1.0]])
    fused, reference = route_both(TopK(6), logits_TE, device, model_top_k=6)
    assert fused.top_k_index_TK.tolist() == [[1, 3, 7, 0, 2, 4]]
    assert_same(fused, reference)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e30])
def test_a_token_whose_logits_are_all_equal(value: float, device: str) -> None:
    rule = BenjaminiHochberg(0.05, null="gaussian", on_empty="model_k")
    fused, reference = route_both(rule, torch.full((3, 60), value), device)
    assert fused.top_k_index_TK.tolist() == [list(range(8))] * 3
    assert_same(fused, reference)


def test_a_token_with_more_than_half_of_its_logits_equal(device: str) -> None:
    logits_TE = random_logits(NUM_TOKENS[device], seed=5)
    logits_TE[:, 20:] = 0.5
    assert_same(*route_both(BenjaminiHochberg(0.05, null="gaussian"), logits_TE, device))


def test_a_score_exactly_on_its_line_is_kept(device: str) -> None:
    rule = BenjaminiHochberg(0.05)
    plan = rule.plan(context_for(rule, device=device))
    assert plan is not None and plan.lines is not None
    # With a median of 0 a logit is its own score: two of them on the line of rank 2, and below.
    line = plan.lines[1].cpu()
    logits_TE = torch.zeros(2, 64)
    logits_TE[0, [3, 11]] = line
    logits_TE[1, [3, 11]] = line.nextafter(torch.tensor(0.0))
    fused, reference = route_both(rule, logits_TE, device)
    assert fused.expert_counts_T.tolist() == [2, 1]
    assert_same(fused, reference)


def test_no_tokens_are_no_trouble(device: str) -> None:
    fused, _ = route_both(TopK(4), torch.empty(0, 64), device)
    assert fused.top_k_index_TK.shape == (0, 8)


@pytest.mark.parametrize(
    "rule",
    [
        Entropy(0.3),
        BenjaminiHochberg(0.05, procedure="storey"),
        BenjaminiHochberg(0.05, null="softmax"),
        BenjaminiHochbergDrop(0.2, scope="block"),
        TopK(4, temperature=2.0, temperature_weights="raw"),
        TopK(33),
    ],
    ids=str,
)
def test_a_rule_without_a_fused_form_is_left_to_its_reference(rule: Rule, device: str) -> None:
    assert fused_router(rule, context_for(rule, device=device), RAW) is None


def test_what_does_not_fit_the_layer_is_refused_before_any_token(device: str) -> None:
    context = context_for(TopK(4), device=device)
    with pytest.raises(CalibrationError, match="needs a calibration"):
        fused_router(BenjaminiHochberg(0.05), context, RAW)
    with pytest.raises(InputError, match="k has 1 entries"):
        fused_router(PerLayerTopK((4,)), replace(context, num_layers=2), RAW)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("family", [RAW, NORMALISED], ids=["raw", "normalised"])
def test_a_gpu_agrees_with_the_twin_bit_for_bit_in_bfloat16(
    rule: Rule, family: SoftmaxFamily
) -> None:
    logits_TE = random_logits(16_384, seed=11).bfloat16()
    assert_same(*route_both(rule, logits_TE, "cuda", family))


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [8, 12, 60, 64, 128, 160, 256, 384, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_gives_the_weights_of_torchs_own_softmax(
    num_experts: int, dtype: torch.dtype
) -> None:
    logits_TE = 4 * random_logits(2_000, num_experts, seed=2).to(dtype)
    fused, reference = route_both(TopK(8), logits_TE, "cuda")
    assert torch.equal(fused.top_k_weights_TK, reference.top_k_weights_TK)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("num_tokens", [1, 512, 8_192])
def test_a_gpu_routes_without_a_sync_inside_a_graph_and_alike_each_time(num_tokens: int) -> None:
    rule = BenjaminiHochberg(0.05)
    fused = fused_router(rule, context_for(rule, device="cuda"), RAW)
    assert fused is not None
    logits_TE = random_logits(num_tokens).bfloat16().cuda()
    expected = fused(logits_TE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fused(logits_TE)
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(logits_TE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
