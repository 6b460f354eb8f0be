"""The probe finds what a router does, leaves no trace, and refuses what it can't establish."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from bh_routing.errors import InputError, ModelError
from bh_routing.models import find_routers, model_fingerprint, route
from bh_routing.rules.fixed import TopK
from tests.families.zoo import tiny_model


@pytest.fixture
def olmoe() -> Any:
    return tiny_model("olmoe")


def first_router(model: Any) -> Any:
    return model.model.layers[0].mlp.gate


def test_probing_leaves_no_trace(olmoe: Any) -> None:
    olmoe.model.layers[1].train()

    def state() -> tuple[Any, ...]:
        return (
            model_fingerprint(olmoe),
            torch.get_rng_state().tolist(),
            [module.training for module in olmoe.modules()],
            [len(module._forward_hooks) for module in olmoe.modules()],
            [len(module._forward_pre_hooks) for module in olmoe.modules()],
            [id(parameter) for parameter in olmoe.parameters()],
            [sorted(vars(module)) for module in olmoe.modules()],
            first_router(olmoe).top_k,
        )

    olmoe(torch.tensor([[5, 6]]))  # transformers installs its own output hooks on a first call
    before = state()
    find_routers(olmoe)
    assert state() == before


def test_a_model_is_probed_once_and_again_when_its_top_k_was_set(olmoe: Any) -> None:
    found = find_routers(olmoe)
    assert find_routers(olmoe) is found
    for layer in olmoe.model.layers:
        layer.mlp.gate.top_k = 3
    assert find_routers(olmoe).model_top_k == 3


def test_layers_that_differ_in_top_k_are_refused(olmoe: Any) -> None:
    first_router(olmoe).top_k = 3
    with pytest.raises(ModelError, match=r"layers differ in top_k \(3, 4\)"):
        find_routers(olmoe)


def cubed(weights_TK: Tensor) -> Tensor:
    return weights_TK**3


def rescaled_by_token(weights_TK: Tensor) -> Tensor:
    return weights_TK * torch.linspace(1, 2, len(weights_TK))[:, None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [(cubed, "by one of softmax, sigmoid"), (rescaled_by_token, "scaled by something unknown")],
)
def test_weights_of_an_unknown_law_are_refused(
    olmoe: Any, change: Callable[[Tensor], Tensor], reason: str
) -> None:
    for layer in olmoe.model.layers:
        forward = layer.mlp.gate.forward
        layer.mlp.gate.forward = lambda hidden, forward=forward: (
            (output := forward(hidden))[0],
            change(output[1]),
            output[2],
        )
    with pytest.raises(ModelError, match=rf"'olmoe' can't be routed: .*{reason}"):
        find_routers(olmoe)


def test_a_selection_that_isnt_the_best_is_refused(olmoe: Any) -> None:
    for layer in olmoe.model.layers:
        forward = layer.mlp.gate.forward

        def worst(hidden: Tensor, forward: Any = forward, gate: Any = layer.mlp.gate) -> Any:
            logits = forward(hidden)[0]
            index = (-logits).topk(gate.top_k).indices
            return logits, logits.softmax(-1).gather(-1, index), index

        layer.mlp.gate.forward = worst
    with pytest.raises(ModelError, match="aren't the best by its logits"):
        find_routers(olmoe)


def test_experts_that_are_given_something_else_are_refused(olmoe: Any) -> None:
    for layer in olmoe.model.layers:
        layer.mlp.experts.register_forward_pre_hook(
            lambda _, given: (given[0], given[1], given[2] * 2)
        )
    with pytest.raises(ModelError, match="aren't given the router's slots"):
        find_routers(olmoe)


def test_a_model_without_experts_is_refused() -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ModelError, match="'llama' can't be routed: no mixture-of-experts router"):
        find_routers(LlamaForCausalLM(config))


def make_quantised(model: Any) -> None:
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}


def make_offloaded(model: Any) -> None:
    model.model.layers[1].mlp.to("meta")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (make_quantised, r"quantised \(gptq\)"),
        (make_offloaded, "on no device"),
    ],
)
def test_quantised_and_spread_models_are_refused(
    olmoe: Any, spoil: Callable[[Any], None], reason: str
) -> None:
    spoil(olmoe)
    with pytest.raises(ModelError, match=reason):
        find_routers(olmoe)


def test_parallelism_of_older_transformers_is_refused(
    olmoe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    olmoe.config.distributed_config = DistributedConfig(tp_size=2)
    monkeypatch.setattr("bh_routing.models.routers.transformers.__version__", "5.17.0")
    with pytest.raises(ModelError, match=r"use transformers 5\.23 or newer"):
        find_routers(olmoe)


@pytest.mark.parametrize("size", ["pp_size", "fsdp_size", "dp_replicate_size"])
def test_untried_parallelism_is_refused(olmoe: Any, size: str) -> None:
    olmoe.config.distributed_config = DistributedConfig.from_dict({size: 2})
    with pytest.raises(ModelError, match=f"by {size}, which was not tried"):
        find_routers(olmoe)


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "gemma4", "mistral4"])
def test_temperature_is_refused_where_softmax_alone_doesnt_decide(family: str) -> None:
    model = tiny_model(family)
    with (
        pytest.raises(InputError, match=r"temperature 2\.0 needs a router"),
        route(model, TopK(4, temperature=2.0)),
    ):
        pytest.fail("the block ran")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_compiled_once_for_all_calls_in_a_block(olmoe: Any) -> None:
    graphs: list[nn.Module] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    olmoe.set_experts_implementation("batched_mm")
    compiled: Any = torch.compile(olmoe, fullgraph=True, backend=backend)
    ids = torch.tensor([[5, 6, 7]])
    with route(compiled, TopK(2)) as trace, torch.no_grad():
        for _ in range(10):
            compiled(ids, use_cache=False)
    assert len(graphs) == 1
    assert trace.forward_tokens == [3] * 10
    assert trace.expert_counts.unique().tolist() == [2]


def other_flag(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.norm_topk_prob = not layer.mlp.gate.norm_topk_prob


def other_weight(model: Any) -> None:
    gate = first_router(model)
    gate.weight = nn.Parameter(gate.weight.clone(), requires_grad=False)


def written_weight(model: Any) -> None:
    first_router(model).weight.mul_(2.0)


def other_experts(model: Any) -> None:
    model.model.layers[0].mlp.experts = copy.deepcopy(model.model.layers[0].mlp.experts)


def other_dtype(model: Any) -> None:
    model.to(torch.bfloat16)


def one_layer_more(model: Any) -> None:
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))


@pytest.mark.parametrize(
    "change",
    [other_flag, other_weight, written_weight, other_experts, other_dtype, one_layer_more],
)
def test_a_changed_model_is_probed_again(olmoe: Any, change: Callable[[Any], None]) -> None:
    found = find_routers(olmoe)
    olmoe.train()
    with route(olmoe, TopK(6)):
        assert find_routers(olmoe) is found
    assert find_routers(olmoe.eval()) is found
    change(olmoe)
    again = find_routers(olmoe)
    assert again is not found
    assert find_routers(olmoe) is again
    if change is other_flag:
        assert again.sites[0].facts.normalises is not found.sites[0].facts.normalises


def test_another_factor_of_the_weights_is_noticed() -> None:
    model = tiny_model("deepseek_v3")
    before = find_routers(model).sites[-1].facts.scale
    for site in find_routers(model).sites:
        owners: tuple[Any, ...] = (site.module, site.block)
        for owner in owners:
            if hasattr(owner, "routed_scaling_factor"):
                owner.routed_scaling_factor = owner.routed_scaling_factor * 2
    after = find_routers(model).sites[-1].facts.scale
    assert before is not None
    assert after == pytest.approx(2 * before, rel=1e-3)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.arange(3, 15)[None], use_cache=False)[0]
    return logits


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("num_experts", [2, 4])
def test_a_model_that_selects_every_expert_is_pruned_as_its_own_smaller_top_k(
    family: str, num_experts: int
) -> None:
    def model_with(top_k: int) -> Any:
        fields = {"num_experts": num_experts, "num_local_experts": num_experts}
        fields |= {"n_routed_experts": num_experts, "n_group": 1, "topk_group": 1}
        return tiny_model(family, top_k=top_k, fields=fields)

    model = model_with(num_experts)
    assert find_routers(model).model_top_k == num_experts
    before = logits_of(model)
    with route(model, TopK(num_experts)):
        assert torch.equal(logits_of(model), before)
    with route(model, TopK(1)):
        pruned = logits_of(model)
    torch.testing.assert_close(pruned, logits_of(model_with(1)), rtol=1e-4, atol=1e-4)


def nan_router(model: Any) -> str:
    model.model.layers[1].mlp.gate.weight[0] = float("nan")
    return "model.layers.1.mlp.gate"


def nan_embedding(model: Any) -> str:
    model.get_input_embeddings().weight.fill_(float("nan"))
    return "model.layers.0.mlp.gate"


def nan_expert(model: Any) -> str:
    model.model.layers[0].mlp.experts.down_proj.fill_(float("nan"))
    return "model.layers.1.mlp.gate"


def infinite_router(model: Any) -> str:
    model.model.layers[0].mlp.gate.weight.fill_(float("inf"))
    return "model.layers.0.mlp.gate"


def nan_bias(model: Any) -> str:
    model.model.layers[1].mlp.gate.e_score_correction_bias.fill_(float("nan"))
    return "model.layers.1.mlp.gate"


@pytest.mark.parametrize(
    ("family", "damage"),
    [
        ("olmoe", nan_router),
        ("olmoe", nan_embedding),
        ("olmoe", nan_expert),
        ("olmoe", infinite_router),
        ("deepseek_v3", nan_bias),
    ],
)
def test_damaged_weights_are_called_so(family: str, damage: Callable[[Any], str]) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        name = damage(model)
    with pytest.raises(ModelError, match=rf"^router {name} .*NaN or infinite"):
        find_routers(model)
