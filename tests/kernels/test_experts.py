"""Sparse experts: torch, kernels interpreted on a CPU, and kernels on a GPU against one loop."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bh_routing.errors import ModelError
from bh_routing.kernels.experts import NAME, mix_torch, read_experts, sparse_experts_forward
from bh_routing.models import LoadedModel

SIZES = SimpleNamespace(
    hidden_size=40,
    intermediate_size=24,
    hidden_act="silu",
    num_local_experts=6,
    # gpt_oss
    swiglu_alpha=1.702,
    swiglu_limit=1.0,
    # nemotron_h
    n_routed_experts=6,
    moe_intermediate_size=24,
    moe_latent_size=None,
    mlp_hidden_act="relu2",
    # aria
    moe_num_experts=6,
    # muse_spark
    moe_hidden_size=40,
    post_norm_eps=1e-6,
)
FAMILIES = {
    "olmoe": "OlmoeExperts",
    "gpt_oss": "GptOssExperts",
    "nemotron_h": "NemotronHExperts",
    "aria": "AriaExperts",
    "muse_spark": "MuseSparkExperts",
}
SMALL_BLOCKS: dict[str, dict[str, Any]] = {
    "torch": {"MOST_GATHERED": 4},
    "few": dict.fromkeys(("UP", "DOWN", "UP_TRANSPOSED", "DOWN_TRANSPOSED"), (32, 16, 2, 1)),
    "grouped": {"PAIRS_AT_A_TIME": 8, "COLUMNS_AT_A_TIME": 32},
}
"""Of the modules' constants: several blocks a matrix of these sizes, and few programs."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Mix = Callable[[Any, Tensor, Tensor, Tensor], Tensor]

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    # Tiles multiply whatever lies past their group's rows, and don't store it.
    pytest.mark.filterwarnings("ignore:.* encountered in matmul:RuntimeWarning"),
]


@pytest.fixture(params=["torch", "few", "grouped"])
def mix(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> Mix:
    """One of the three ways to mix, by name; the kernels where they can run, in small blocks."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    is_kernel = request.param != "torch"
    if is_kernel and (not find_spec("triton") or is_interpreted != (device == "cpu")):
        pytest.skip("needs Triton: with TRITON_INTERPRET=1 on a CPU, without it on a GPU")
    module = importlib.import_module(
        "bh_routing.kernels.experts_triton" if is_kernel else "bh_routing.kernels.experts"
    )
    for name, size in SMALL_BLOCKS[request.param].items():
        is_block = isinstance(size, tuple)
        monkeypatch.setattr(module, name, module.Block(*size) if is_block else size)
    found: Mix = getattr(module, f"mix_{request.param}")
    return found


def make_experts(
    family: str = "olmoe",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    sizes: SimpleNamespace = SIZES,
) -> Any:
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        experts = getattr(module, FAMILIES[family])(sizes)
    except (ImportError, AttributeError):
        pytest.skip(f"this transformers has no {FAMILIES[family]}")
    if not hasattr(experts, "is_transposed"):
        pytest.skip(f"this transformers runs {FAMILIES[family]} past its experts interface")
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return experts.to(device, dtype)


def make_routing(
    tokens: int, experts: Any, dropped: float = 0.4, slots: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, indices and weights: a dropped slot weighs 0 and names the best expert."""
    weight = experts.down_proj
    generator = torch.Generator().manual_seed(tokens)
    hidden_size = read_experts(experts).up.shape[2]
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(weight.dtype)
    weights, index = torch.rand(tokens, len(weight), generator=generator).topk(slots, dim=-1)
    is_dropped = torch.rand(tokens, slots, generator=generator) < dropped
    is_dropped[:, 0] = False
    index = torch.where(is_dropped, index[:, :1], index)
    weights = weights.masked_fill(is_dropped, 0.0)
    return hidden.to(weight.device), index.to(weight.device), weights.to(weight.device)


def loop_over_slots(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The obvious way, one kept slot at a time, in float32 with the family's own gate and norm."""
    layer = read_experts(copy.deepcopy(experts).float())
    mixed = torch.zeros_like(hidden, dtype=torch.float32)
    for token, slot in (weights != 0).nonzero().tolist():
        expert = index[token, slot]
        inner = layer.up[expert] @ hidden[token].float()
        if layer.up_bias is not None:
            inner = inner + layer.up_bias[expert]
        output = layer.down[expert] @ layer.activate(inner)
        if layer.down_bias is not None:
            output = output + layer.down_bias[expert]
        if layer.normalize is not None:
            output = layer.normalize(output)
        mixed[token] += output * weights[token, slot].float()
    return mixed


def assert_near(mixed: Tensor, expected: Tensor) -> None:
    error = (mixed.float() - expected).norm() / expected.norm()
    assert error < TOLERANCE[mixed.dtype], f"relative error {error:.1e}"


def mixed_and_expected(mix: Mix, experts: Any, *routing: Tensor) -> tuple[Tensor, Tensor]:
    return mix(read_experts(experts), *routing), loop_over_slots(experts, *routing)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_mixes_what_a_loop_mixes(mix: Mix, family: str, device: str) -> None:
    experts = make_experts(family, device)
    if family == "muse_spark" and mix.__name__ == "mix_few":
        pytest.skip("a norm needs each expert's whole output")
    assert_near(*mixed_and_expected(mix, experts, *make_routing(3, experts)))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_mixes_what_a_loop_mixes(mix: Mix, dtype: torch.dtype, device: str) -> None:
    experts = make_experts("olmoe", device, dtype)
    if (device, dtype, mix.__name__) == ("cpu", torch.bfloat16, "mix_grouped"):
        pytest.skip("Triton's interpreter multiplies matrices of bfloat16 as if they were integers")
    hidden, index, weights = make_routing(3, experts)
    mixed, expected = mixed_and_expected(mix, experts, hidden, index, weights.to(dtype))
    assert mixed.dtype == dtype
    assert_near(mixed, expected)


@pytest.mark.parametrize("tokens", [1, 20, pytest.param(300, marks=pytest.mark.full)])
def test_any_number_of_tokens_mixes_what_a_loop_mixes(mix: Mix, tokens: int, device: str) -> None:
    if device == "cpu" and tokens > 1 and mix.__name__ == "mix_few":
        pytest.skip("an interpreted program takes milliseconds, and there is one a slot and block")
    experts = make_experts(device=device)
    assert_near(*mixed_and_expected(mix, experts, *make_routing(tokens, experts)))


def test_sizes_that_fill_no_block_mix_what_a_loop_mixes(mix: Mix, device: str) -> None:
    sizes = SimpleNamespace(**{**vars(SIZES), "hidden_size": 37, "intermediate_size": 21})
    experts = make_experts("olmoe", device, sizes=sizes)
    assert_near(*mixed_and_expected(mix, experts, *make_routing(3, experts, slots=5)))


def test_one_expert_can_take_all_tokens(mix: Mix, device: str) -> None:
    experts = make_experts(device=device)
    hidden, index, weights = make_routing(7, experts, dropped=0.0)
    assert_near(*mixed_and_expected(mix, experts, hidden, index * 0 + 5, weights))


def test_a_poisoned_dropped_expert_changes_no_bit(mix: Mix, device: str) -> None:
    experts = make_experts("gpt_oss", device)
    hidden, index, weights = make_routing(3, experts, dropped=0.0)
    index[index == 2] = 1
    index[:, 1], weights[:, 1] = 2, 0.0
    clean = mix(read_experts(experts), hidden, index, weights)
    for parameter in experts.parameters():
        parameter[2] = torch.nan
    assert torch.equal(mix(read_experts(experts), hidden, index, weights), clean)


def test_a_token_with_every_slot_dropped_is_exactly_zero(mix: Mix, device: str) -> None:
    experts = make_experts("gpt_oss", device)
    hidden, index, weights = make_routing(3, experts)
    weights[1] = 0.0
    mixed = mix(read_experts(experts), hidden, index, weights)
    assert mixed[1].abs().max() == 0.0
    assert mixed[2].abs().max() > 0.0
    assert mix(read_experts(experts), hidden, index, weights * 0).abs().max() == 0.0


def test_an_index_of_no_expert_counts_as_dropped(mix: Mix, device: str) -> None:
    experts = make_experts(device=device)
    hidden, index, weights = make_routing(3, experts)
    expected = loop_over_slots(experts, hidden, index, weights * torch.tensor([1, 1, 0]).to(device))
    index[:, 2] = 6
    assert_near(mix(read_experts(experts), hidden, index, weights), expected)


def test_two_runs_give_the_same_bits(mix: Mix, device: str) -> None:
    if device == "cpu" and mix is not mix_torch:
        pytest.skip("an interpreter runs programs one after the other")
    experts = make_experts("olmoe", device, torch.bfloat16)
    routing = make_routing(300, experts)
    once, again = (mix(read_experts(experts), *routing) for _ in range(2))
    assert torch.equal(once, again)


def test_quantised_experts_are_refused_by_name(device: str) -> None:
    experts = make_experts(device=device)
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.to(torch.int8), False)
    with pytest.raises(ModelError, match="int8; sparse experts take bfloat16"):
        sparse_experts_forward(experts, *make_routing(1, experts))


def test_a_gradient_flows_to_the_hidden_states(device: str) -> None:
    experts = make_experts(device=device)
    hidden, index, weights = make_routing(5, experts)
    gradients = []
    for mixed in (sparse_experts_forward, loop_over_slots):
        leaf = hidden.clone().requires_grad_()
        mixed(experts, leaf, index, weights).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_silu_gated_experts_take_the_fused_kernel(demo: LoadedModel, device: str) -> None:
    assert read_experts(demo.model.model.layers[0].mlp.experts).is_silu_gated
    assert not read_experts(make_experts("gpt_oss")).is_silu_gated
    assert NAME == "bh_sparse"
