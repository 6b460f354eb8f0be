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

from bh_routing.kernels.decode import DecodeState, bind_torch
from bh_routing.kernels.decode_layout import Decoder, read_decoder
from bh_routing.kernels.router import Router, SoftmaxFamily, reference_router
from bh_routing.rules.base import LayerContext
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg

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


def write(decoder: Decoder, bind: Any, tokens: list[int]) -> tuple[Tensor, ...]:
    """Feed tokens; return each step's logits, the cache, and what was noted."""
    with torch.inference_mode():
        state = DecodeState.empty(decoder, batch=1, num_positions=8, num_slots=3)
        step = bind(decoder, state, make_routers(decoder))
        logits = []
        for position, token in enumerate(tokens):
            state.token_B.fill_(token)
            state.position_1.fill_(position)
            step()
            logits.append(state.logits_BV[0].clone())
            assert int(state.token_B) == int(logits[-1].argmax())
            assert int(state.position_1) == position + 1
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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bind", ["bind_torch", "bind_few"])
def test_the_noted_logit_tells_which_steps_are_broken(bind: str, value: float) -> None:
    few = importlib.import_module("bh_routing.kernels.decode_triton")
    decoder = make_decoder("qwen3_moe")
    # Broken is the last step alone: its token's embedding, after the tokens before were written.
    decoder.embedding_VH[13, 5] = value
    top_PB = write(decoder, {"bind_torch": bind_torch, "bind_few": few.bind_few}[bind], [7, 0, 13])[
        -1
    ]
    assert (top_PB[:3, 0] < torch.inf).tolist() == [True, True, False]


@pytest.mark.parametrize("bind", ["bind_torch", "bind_few"])
def test_one_nan_among_the_logits_is_noted(bind: str) -> None:
    few = importlib.import_module("bh_routing.kernels.decode_triton")
    decoder = make_decoder("qwen3_moe")
    decoder.head_VH[31, 2] = torch.nan
    top_PB = write(decoder, {"bind_torch": bind_torch, "bind_few": few.bind_few}[bind], [7, 0])[-1]
    assert not (top_PB[:2] < torch.inf).any()
