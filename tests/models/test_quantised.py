"""FP8 and MXFP4 checkpoints are read as plain weights and routed; other methods are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bh_routing.errors import ModelError
from bh_routing.models import load_model, route
from bh_routing.rules import TopK, TopP
from tests.families.zoo import VOCABULARY, tiny_model

BLOCK = 16
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""Magnitudes of E2M1 (OCP Microscaling Formats 1.0, section 5.3.3); the fourth bit is the sign."""


def save_quantised(family: str, folder: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Save a tiny model, its float weights taken out, and return them."""
    tiny_model(family).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return weights


def save_fp8(family: str, folder: Path) -> dict[str, Tensor]:
    """Save a model whose projections are FP8 with a scale a block, and return what they mean."""
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK]}  # fmt: skip
    stored = save_quantised(family, folder, settings)
    meant = {}
    for name, weight in list(stored.items()):
        is_whole = weight.ndim == 2 and not any(size % BLOCK for size in weight.shape)
        if "proj" not in name or not is_whole:
            continue
        blocks = weight.view(weight.shape[0] // BLOCK, BLOCK, -1, BLOCK)
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        spread = scale[:, None, :, None]
        stored[name] = (blocks / spread).view_as(weight).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        meant[name] = (stored[name].float().view_as(blocks) * spread).view_as(weight)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


def save_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Save gpt-oss with experts of random four-bit numbers, and return what they mean."""
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ]}  # fmt: skip
    stored = save_quantised("gpt_oss", folder, settings)
    generator = torch.Generator().manual_seed(0)
    meant = {}
    for name in [name for name in stored if name.endswith("_proj")]:
        experts, inside, outside = stored.pop(name).shape
        code = torch.randint(0, 16, (experts, outside, inside // 32, 32), generator=generator)
        power = torch.randint(118, 124, code.shape[:3], generator=generator)
        pairs = code.view(*code.shape[:3], 16, 2)
        stored[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
        stored[f"{name}_scales"] = power.to(torch.uint8)
        number = FP4[code % 8] * torch.where(code < 8, 1.0, -1.0) * 2.0 ** (power - 127)[..., None]
        meant[name] = number.flatten(2).transpose(1, 2)
    save_file(
        {name: weight.contiguous() for name, weight in stored.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return meant


@pytest.mark.parametrize("kind", ["fp8 qwen3_moe", "fp8 deepseek_v3", "mxfp4"])
def test_a_quantised_checkpoint_is_widened_and_pruned(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="bh_routing")
    folder = tmp_path / "model"
    meant = save_mxfp4(folder) if kind == "mxfp4" else save_fp8(kind.split()[1], folder)
    assert meant
    model, _ = load_model(str(folder), device="cpu")
    assert f"are stored as {kind.split()[0]}, and widened" in caplog.text
    read = dict(model.named_parameters())
    assert {weight.dtype for weight in read.values()} == {torch.float32}
    same = [name for name in meant if name in read]  # others are merged into one for all experts
    assert same
    for name in same:
        torch.testing.assert_close(read[name], meant[name], rtol=0, atol=0)
    ids = torch.arange(3, 23)[None]
    plain = model(ids).logits
    with route(model, TopK(4)):
        assert torch.equal(model(ids).logits, plain)
    with route(model, TopP(0.53)) as trace:
        assert model(ids).logits.isfinite().all()
    assert len(trace.expert_counts.unique()) > 1


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_other_methods_are_refused_before_weights_are_read(method: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_quantised("qwen3_moe", folder, {"quant_method": method, "bits": 4})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"is quantised by {method}; only fp8 and mxfp4"):
        load_model(str(folder), device="cpu")
