"""The kernels of a decoding step against the step in plain torch."""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from bh_routing.kernels.decode import DecodeState, bind_prompts, bind_torch
from bh_routing.kernels.decode_layout import Decoder, read_decoder
from bh_routing.rules.base import LayerContext
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.router import Router, SoftmaxFamily, reference_router

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not find_spec("triton") or (DEVICE == "cpu") != IS_INTERPRETED,
    reason="needs Triton: with TRITON_INTERPRET=1 on a CPU, without it on a GPU",
)

SIZES: dict[str, Any] = {
    "vocab_size": 45,
    "hidden_size": 40,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": None,
}
FAMILIES = {
    # A norm over all heads; hidden 64 is heads x 16.
    "olmoe": (OlmoeConfig, {"hidden_size": 64, "head_dim": 16}),
    # A norm over each head, and two heads to a key.
    "qwen3_moe": (Qwen3MoeConfig, {"num_key_value_heads": 2}),
    # No norm, and four heads to a key.
    "mixtral": (MixtralConfig, {"num_key_value_heads": 1}),
}


def make_decoder(family: str, dtype: torch.dtype = torch.float32) -> Decoder:
    config_class, changes = FAMILIES[family]
    config = config_class(**SIZES | changes)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = config_class.__name__.removesuffix("Config")
    torch.manual_seed(0)
    model = getattr(module, f"{name}ForCausalLM")(config).to(DEVICE, dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False).normal_(std=0.3)
    blocks = [layer.mlp for layer in model.model.layers]
    return read_decoder(model, blocks, 8)


def make_routers(decoder: Decoder) -> list[Router]:
    rule = BenjaminiHochberg(alpha=0.9, min_k=1, max_k=3, null="gaussian")
    family = SoftmaxFamily(normalises=True)
    device = decoder.embedding_VH.device
    return [
        reference_router(
            rule,
            LayerContext(layer=layer, num_experts=6, model_top_k=3, device=device),
            family,
        )
        for layer in range(len(decoder.layers))
    ]


def write(decoder: Decoder, bind: Any, steps: list[Any], starts: Any = 0) -> tuple[Tensor, ...]:
    """Feed one token per step and sequence; return each step's logits, the cache, and the rest."""
    token_SB = torch.tensor(steps).view(len(steps), -1)
    with torch.inference_mode():
        state = DecodeState.empty(decoder, batch=token_SB.shape[1], num_positions=8, num_slots=3)
        step = bind(decoder, state, make_routers(decoder))
        state.position_B.copy_(torch.as_tensor(starts))
        logits = []
        for number, token_B in enumerate(token_SB):
            state.token_B.copy_(token_B)
            step()
            logits.append(state.logits_BV.clone())
            assert torch.equal(state.token_B, logits[-1].argmax(-1))
            ends = torch.as_tensor(starts).expand_as(token_B) + number + 1
            assert torch.equal(state.position_B.cpu(), ends)
    noted = (state.kept_PLBK, state.token_PB, state.top_PB)
    return torch.stack(logits), state.keys, state.values, *noted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_write_what_torch_writes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = importlib.import_module("bh_routing.kernels.decode_triton")
    # Parts of 2 positions, so that a few tokens fill several.
    monkeypatch.setattr(few, "POSITIONS_IN_A_PART", 2)
    decoder = make_decoder(family)
    tokens = [7, 44, 0, 13, 13]
    expected = write(decoder, bind_torch, tokens)
    found = write(decoder, few.bind_few, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


STEPS = [[7, 44, 0], [13, 13, 30], [13, 2, 13], [1, 40, 13]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("programs", [1, 1024])
def test_the_kernels_of_a_batch_write_what_torch_writes(
    family: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = importlib.import_module("bh_routing.kernels.decode_triton")
    many = importlib.import_module("bh_routing.kernels.decode_batch_triton")
    # Parts of 2 positions or of all, so that a few tokens fill several or one.
    monkeypatch.setattr(few, "POSITIONS_IN_A_PART", 2)
    monkeypatch.setattr(few, "MOST_PROGRAMS", programs)
    decoder = make_decoder(family)
    starts = [0, 4, 2]
    expected = write(decoder, bind_torch, STEPS, starts)
    found = write(decoder, many.bind_batch, STEPS, starts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_expert_of_more_tokens_than_a_tile_is_read_in_several() -> None:
    many = importlib.import_module("bh_routing.kernels.decode_batch_triton")
    decoder = make_decoder("mixtral")
    # The same token 40 times: all of its experts have 40 slots, a tile 16.
    steps = [[7] * 40 + [1], [3] * 20 + [9] * 21]
    expected = write(decoder, bind_torch, steps)
    found = write(decoder, many.bind_batch, steps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bind", ["bind_torch", "bind_batch"])
def test_a_sequence_of_another_length_is_written_as_alone(bind: str) -> None:
    many = importlib.import_module("bh_routing.kernels.decode_batch_triton")
    decoder = make_decoder("qwen3_moe")
    starts = [3, 0, 4]
    function = {"bind_torch": bind_torch, "bind_batch": many.bind_batch}[bind]
    together = write(decoder, function, STEPS, starts)[0]
    for column, start in enumerate(starts):
        tokens = [row[column] for row in STEPS]
        alone = write(decoder, bind_torch, tokens, start)[0]
        torch.testing.assert_close(together[:, column], alone[:, 0], rtol=1e-4, atol=1e-5)


def feed(bind: str, decoder: Decoder, tokens: list[int]) -> Tensor:
    """Feed tokens, to two sequences if `bind` takes a batch; return the largest logits by step."""
    module = "decode_triton" if bind == "bind_few" else "decode_batch_triton"
    kernels = importlib.import_module(f"bh_routing.kernels.{module}")
    function = bind_torch if bind == "bind_torch" else getattr(kernels, bind)
    steps = [[token, 1] for token in tokens] if bind == "bind_batch" else tokens
    return write(decoder, function, steps)[-1][:, 0]


BINDS = ["bind_torch", "bind_few", "bind_batch"]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bind", BINDS)
def test_the_noted_logit_tells_which_steps_are_broken(bind: str, value: float) -> None:
    decoder = make_decoder("qwen3_moe")
    # Broken is the last step alone: its token's embedding, after the tokens before were written.
    decoder.embedding_VH[13, 5] = value
    top_P = feed(bind, decoder, [7, 0, 13])
    assert (top_P[:3] < torch.inf).tolist() == [True, True, False]


@pytest.mark.parametrize("bind", BINDS)
def test_one_nan_among_the_logits_is_noted(bind: str) -> None:
    decoder = make_decoder("qwen3_moe")
    decoder.head_VH[31, 2] = torch.nan
    assert not (feed(bind, decoder, [7, 0])[:2] < torch.inf).any()


PROMPTS = [[7, 44, 0, 13], [13], [], [2, 40]]


def read_prompts(decoder: Decoder, prompts: list[list[int]]) -> tuple[DecodeState, Tensor]:
    """Read prompts, padded, and take two steps; return the state and the logits after prefill."""
    token_BP = torch.full((len(prompts), 4), 9, device=DEVICE)
    length_B = torch.tensor([len(prompt) for prompt in prompts], device=DEVICE)
    for row, prompt in enumerate(prompts):
        token_BP[row, : len(prompt)] = torch.tensor(prompt)
    with torch.inference_mode():
        state = DecodeState.empty(decoder, batch=len(prompts), num_positions=8, num_slots=3)
        state.is_end_V[PROMPTS[0][0]] = True
        routers = make_routers(decoder)
        bind_prompts(decoder, state, routers)(token_BP, length_B)
        logits_BV, step = state.logits_BV.clone(), bind_torch(decoder, state, routers)
        for _ in range(2):
            step()
    return state, logits_BV


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernels_of_a_prefill_write_what_torch_writes(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make_decoder(family)
    prompts = [*PROMPTS, [1, 2, 3, 4]]
    found, logits_BV = read_prompts(decoder, prompts)
    monkeypatch.setattr("bh_routing.kernels.decode._PREFILL", None)
    expected, expected_logits_BV = read_prompts(decoder, prompts)
    torch.testing.assert_close(logits_BV, expected_logits_BV, rtol=1e-4, atol=1e-5)
    for name in ("keys", "values", "kept_PLBK", "token_PB", "top_PB", "position_B", "is_live_B"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_read_as_its_tokens_one_by_one(family: str) -> None:
    decoder = make_decoder(family)
    state, logits_BV = read_prompts(decoder, PROMPTS)
    assert state.position_B.tolist() == [6, 3, 3, 4]
    for row, prompt in enumerate(PROMPTS):
        if not prompt:
            assert (state.kept_PLBK[:4, :, row] == -1).all()
            continue
        alone = write(decoder, bind_torch, prompt)
        torch.testing.assert_close(logits_BV[row], alone[0][-1, 0], rtol=1e-4, atol=1e-5)
        end = len(prompt)
        for ours, theirs in ((state.keys, alone[1]), (state.values, alone[2])):
            read = ours[:, row, :, :end], theirs[:, 0, :, :end]
            torch.testing.assert_close(*read, rtol=1e-4, atol=1e-5)
        assert torch.equal(state.kept_PLBK[:end, :, row], alone[3][:end, :, 0])
        assert state.token_PB[end - 1, row] == alone[4][end - 1, 0]


def test_padding_never_reaches_the_cache() -> None:
    decoder = make_decoder("qwen3_moe")
    decoder.embedding_VH[9] = torch.nan  # the padding
    state, logits_BV = read_prompts(decoder, PROMPTS)
    assert logits_BV[[0, 1, 3]].isfinite().all()
    assert state.keys.isfinite().all()


@pytest.mark.parametrize("bind", ["bind_torch", "bind_batch"])
def test_an_ended_sequence_keeps_nothing_and_changes_no_other(bind: str) -> None:
    many = importlib.import_module("bh_routing.kernels.decode_batch_triton")
    function = {"bind_torch": bind_torch, "bind_batch": many.bind_batch}[bind]
    decoder = make_decoder("qwen3_moe")

    def feed_batch(is_live: list[bool]) -> DecodeState:
        with torch.inference_mode():
            state = DecodeState.empty(decoder, batch=3, num_positions=8, num_slots=3)
            step = function(decoder, state, make_routers(decoder))
            state.is_live_B.copy_(torch.tensor(is_live))
            for token_B in STEPS:
                state.token_B.copy_(torch.tensor(token_B))
                step()
        return state

    free, ended = feed_batch([True] * 3), feed_batch([True, False, True])
    for name in ("kept_PLBK", "keys", "token_PB", "top_PB"):
        axis = 2 if name == "kept_PLBK" else 1
        rows = torch.tensor([0, 2], device=DEVICE)
        ours, theirs = (getattr(state, name).index_select(axis, rows) for state in (ended, free))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ended.kept_PLBK[: len(STEPS), :, 1] == -1).all()
    assert (free.kept_PLBK[: len(STEPS), :, 1] >= 0).any()


@pytest.mark.parametrize("bind", BINDS)
def test_an_end_token_ends_its_sequence(bind: str) -> None:
    module = "decode_triton" if bind == "bind_few" else "decode_batch_triton"
    kernels = importlib.import_module(f"bh_routing.kernels.{module}")
    function = bind_torch if bind == "bind_torch" else getattr(kernels, bind)
    batch = 1 if bind == "bind_few" else 2
    decoder = make_decoder("mixtral")
    with torch.inference_mode():
        state = DecodeState.empty(decoder, batch=batch, num_positions=8, num_slots=3)
        step = function(decoder, state, make_routers(decoder))
        state.token_B.copy_(torch.tensor([7, 44][:batch]))
        step()
        first = state.token_B.tolist()
        assert state.is_live_B.all()
        state.is_end_V[first[0]] = True
        state.token_B.copy_(torch.tensor([7, 44][:batch]))
        state.position_B.zero_()
        step()
        assert state.is_live_B.tolist() == [token != first[0] for token in first]
