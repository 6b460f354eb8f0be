"""Parts, wrappers, copies, gradients and padding: where `route` counts, and where it rejects."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import TextGenerationPipeline

from bh_routing.errors import InputError, ModelError
from bh_routing.models import LoadedModel, find_routers, model_fingerprint, route
from bh_routing.rules.fixed import TopK
from bh_routing.rules.mass import TopP
from tests.families.zoo import tiny_model

IDS = torch.arange(3, 15)[None]
LENGTHS = (3, 12)
MASK = torch.arange(12).expand(2, -1) >= 12 - torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def olmoe() -> Any:
    return tiny_model("olmoe")


def whole(model: Any) -> Any:
    return model


def part(model: Any) -> Any:
    return model.model


def deeper_part(model: Any) -> Any:
    return model.model.layers[1]


def wrapper(model: Any) -> Any:
    return torch.nn.Sequential(model)


def data_parallel(model: Any) -> Any:
    return DataParallel(model)


@pytest.mark.parametrize("other", [whole, part, deeper_part, wrapper, data_parallel])
@pytest.mark.parametrize("is_probed_first", [True, False])
def test_the_same_routers_are_not_routed_twice(
    olmoe: Any, other: Callable[[Any], Any], is_probed_first: bool
) -> None:
    second = other(olmoe)
    if is_probed_first and other not in (deeper_part, wrapper):  # which take no input ids
        find_routers(second)
    with (
        route(olmoe, TopK(1)),
        pytest.raises(ModelError, match="already inside route"),
        route(second, TopK(3)),
    ):
        pytest.fail("the block ran")


def test_a_model_is_not_routed_inside_its_part(olmoe: Any) -> None:
    with (
        route(olmoe.model, TopK(1)),
        pytest.raises(ModelError, match="already inside route"),
        route(olmoe, TopK(3)),
    ):
        pytest.fail("the block ran")


def test_another_model_may_be_routed_inside_the_block(olmoe: Any) -> None:
    other = tiny_model("olmoe")
    with route(olmoe, TopK(1)) as outer, route(other, TopK(3)) as inner:
        olmoe(input_ids=IDS)
        other(input_ids=IDS)
    assert outer.expert_counts.unique().tolist() == [1]
    assert inner.expert_counts.unique().tolist() == [3]


def test_distributed_data_parallel_is_routed_as_the_model_inside(
    olmoe: Any, tmp_path: Path
) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        olmoe.requires_grad_(True)
        with route(olmoe, TopK(2)):
            expected = olmoe(input_ids=IDS).logits
        parallel = DistributedDataParallel(olmoe)
        assert model_fingerprint(parallel) == model_fingerprint(olmoe)
        with route(parallel, TopK(2)) as trace:
            assert torch.equal(parallel(input_ids=IDS).logits, expected)
        assert trace.expert_counts.unique().tolist() == [2]
    finally:
        torch.distributed.destroy_process_group()


def test_copies_on_several_gpus_are_rejected(olmoe: Any) -> None:
    parallel = DataParallel(olmoe)
    parallel.device_ids = [0, 1]
    with pytest.raises(ModelError, match="copies of the model on 2 GPUs"):
        find_routers(parallel)


def test_a_pipelines_model_is_routed_and_the_pipeline_itself_is_rejected(demo: LoadedModel) -> None:
    writer: Any = TextGenerationPipeline(model=demo.model, tokenizer=demo.tokenizer)
    with pytest.raises(InputError, match=r"got TextGenerationPipeline; .*pipeline\.model"):
        find_routers(writer)
    with route(writer.model, TopK(3)) as trace:
        writer("The old man", max_new_tokens=3, do_sample=False)
    assert trace.forward_tokens == [len(demo.tokenizer("The old man")["input_ids"]), 1, 1]
    assert trace.expert_counts.unique().tolist() == [3]


# PEFT asks transformers by a name that is deprecated there.
through_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LORA: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj"]},
    "router": {"target_parameters": ["gate.weight"]},
    "experts": {"target_parameters": ["experts.down_proj"]},
    "trained router": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
}


@through_peft
@pytest.mark.parametrize("adapter", LORA.values(), ids=LORA.keys())
def test_a_model_with_an_adapter_is_routed_as_the_merged_model_is(adapter: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, **adapter)
    adapted: Any = get_peft_model(tiny_model("mixtral"), config).eval()
    found = []
    for k in (2, 6):
        with route(adapted, TopK(k)) as trace:
            found.append(adapted(input_ids=IDS).logits)
            adapted.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
        assert trace.forward_tokens == [12, 12, 1]
        assert trace.expert_counts.unique().tolist() == [k]
        with (
            route(adapted, TopK(k)),
            pytest.raises(ModelError, match="already inside route"),
            route(adapted.base_model.model, TopK(k)),
        ):
            pytest.fail("the block ran")
    merged = adapted.merge_and_unload()
    for k, logits in zip((2, 6), found, strict=True):
        with route(merged, TopK(k)):
            torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


@through_peft
def test_padding_is_not_in_the_trace_of_a_model_called_through_its_adapter() -> None:
    base = tiny_model("olmoe")
    adapted: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    for routed in (base, adapted):
        with route(routed, TopK(2)) as trace:
            adapted(input_ids=IDS.expand(2, -1), attention_mask=MASK.long())
        assert trace.forward_tokens == [sum(LENGTHS)]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("family", ["olmoe", "dbrx"])
def test_a_routed_model_is_not_copied(family: str, copied: Callable[[Any], Any]) -> None:
    model = tiny_model(family)
    with route(model, TopK(2)), pytest.raises(ModelError, match="can't be copied or pickled"):
        copied(model)
    plain = copy.deepcopy(model)
    assert torch.equal(plain(input_ids=IDS)[0], model(input_ids=IDS)[0])


@pytest.mark.parametrize(
    "family", ["olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "gemma4", "dbrx"]
)
def test_every_weight_gets_the_gradient_of_the_models_own_smaller_top_k(family: str) -> None:
    def gradients(model: Any) -> dict[str, Tensor]:
        model.requires_grad_(True).zero_grad(set_to_none=True)
        model(input_ids=IDS, use_cache=False)[0].square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(tiny_model(family, top_k=3))
    model = tiny_model(family)
    with route(model, TopK(3)):
        found = gradients(model)
    names = [site.name for site in find_routers(model).sites]
    assert any(name in key and grad.any() for key, grad in expected.items() for name in names)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_temperature_is_part_of_the_gates_gradient(olmoe: Any) -> None:
    olmoe.requires_grad_(True)
    gate = olmoe.model.layers[-1].mlp.gate.weight
    with route(olmoe, TopK(3, temperature=2.0)), torch.no_grad():
        before = olmoe(input_ids=IDS).logits.square().mean()
    with route(olmoe, TopK(3, temperature=2.0)):
        olmoe(input_ids=IDS).logits.square().mean().backward()
        with torch.no_grad():
            step = 1e-3 * gate.grad / gate.grad.norm()
            gate.add_(step)
            after = olmoe(input_ids=IDS).logits.square().mean()
    assert float(after - before) == pytest.approx(1e-3 * float(gate.grad.norm()), rel=0.1)


def test_gradient_checkpointing_of_the_model_is_rejected_while_it_trains(olmoe: Any) -> None:
    for layer in olmoe.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    olmoe.requires_grad_(True)
    with route(olmoe, TopK(2)) as trace:
        with pytest.raises(ModelError, match="runs layers again in the backward pass"):
            olmoe.train()(input_ids=IDS)
        with torch.no_grad():
            olmoe.train()(input_ids=IDS[:, :5], use_cache=False)
        olmoe.eval()(input_ids=IDS)
    assert trace.forward_tokens == [5, 12]


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_run_again_in_the_backward_pass_count_once(olmoe: Any, reentrant: bool) -> None:
    olmoe.requires_grad_(True)
    embedded = olmoe.get_input_embeddings()(IDS)
    with route(olmoe, TopK(2)) as trace:
        output = checkpoint(
            lambda given: olmoe(inputs_embeds=given).logits, embedded, use_reentrant=reentrant
        )
        output.square().mean().backward()
    assert trace.forward_tokens == [IDS.numel()]
    assert len(trace.expert_counts) == IDS.numel()


def alone(model: Any, row: int) -> Tensor:
    with route(model, TopP(0.5)) as trace:
        model(input_ids=IDS[:, 12 - LENGTHS[row] :])
    return trace.expert_counts


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_in_the_trace(olmoe: Any, side: str) -> None:
    mask = MASK if side == "left" else MASK.flip(1)
    with route(olmoe, TopP(0.5)) as trace, torch.no_grad():
        olmoe(IDS.expand(2, -1), mask.long())
        olmoe(input_ids=IDS)
    assert trace.forward_tokens == [sum(LENGTHS), 12]
    assert len(trace.expert_counts) == sum(LENGTHS) + 12
    assert trace.utilization.sum() == trace.expert_counts.sum()
    assert trace.expert_counts.min() >= 1


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generating_from_padded_prompts_counts_tokens(
    olmoe: Any, cache: str, attention: str
) -> None:
    olmoe.set_attn_implementation(attention)
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    ids = IDS.expand(2, -1).masked_fill(~MASK, 0)
    with route(olmoe, TopP(0.5)) as trace:
        olmoe.generate(input_ids=ids, attention_mask=MASK.long(), **options)
    assert trace.forward_tokens == [sum(LENGTHS), 2, 2]
    assert torch.equal(trace.expert_counts[: LENGTHS[0]], alone(olmoe, 0))
    assert torch.equal(trace.expert_counts[LENGTHS[0] : sum(LENGTHS)], alone(olmoe, 1))


@pytest.mark.parametrize("family", ["gemma4", "gpt_oss", "dbrx"])
def test_padding_of_other_kinds_of_models_is_not_in_the_trace(family: str) -> None:
    model = tiny_model(family)
    with route(model, TopP(0.5)) as trace, torch.no_grad():
        model(input_ids=IDS.expand(2, -1), attention_mask=MASK.long())
    assert trace.forward_tokens == [sum(LENGTHS)]


def test_padding_is_not_in_the_trace_of_a_compiled_model(olmoe: Any) -> None:
    torch.compiler.reset()
    olmoe.set_experts_implementation("batched_mm")
    compiled: Any = torch.compile(olmoe, fullgraph=True, backend="eager")
    with route(compiled, TopP(0.5)) as trace, torch.no_grad():
        for _ in range(2):
            compiled(input_ids=IDS.expand(2, -1), attention_mask=MASK.long(), use_cache=False)
    assert trace.forward_tokens == [sum(LENGTHS)] * 2


def test_reading_inside_the_block_is_never_stale(olmoe: Any) -> None:
    with route(olmoe, TopK(2)) as trace, torch.no_grad():
        assert trace.expert_counts.shape[0] == 0
        for calls in (1, 2, 3):
            olmoe(input_ids=IDS)
            assert len(trace.expert_counts) == len(trace.kept_index) == 12 * calls
            assert int(trace.utilization[0].sum()) == 2 * 12 * calls
        trace.clear()
        assert trace.forward_tokens == []
        olmoe(input_ids=IDS[:, :5])
        assert len(trace.expert_counts) == 5


def test_a_call_that_failed_on_its_way_is_not_in_the_trace(olmoe: Any) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    with route(olmoe, TopK(2)) as trace, torch.no_grad():
        handle = olmoe.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            olmoe(input_ids=IDS)
        handle.remove()
        olmoe(input_ids=IDS[:, :5])
    assert trace.forward_tokens == [5]
    assert trace.expert_counts.shape == (5, 2)
