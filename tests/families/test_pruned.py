"""A pruned checkpoint of every family computes what its original does without those experts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from bh_routing.demo import demo_folder
from bh_routing.errors import ModelError
from bh_routing.models import find_routers, load_model
from bh_routing.models.expert_axes import block_of, check_routers, open_checkpoint
from bh_routing.models.prune import write_pruned
from tests.families.checkpoints import save_tiny
from tests.families.misses import REFUSED
from tests.families.test_routing import newest_only
from tests.families.zoo import family_names, tiny_model
from tests.models.masking import without_experts

NOT_PRUNED: Final = {
    "deepseek_v4": "looks experts up by token id",
    "diffusion_gemma": "generates no text token by token",
    "ernie4_5_vl_moe": "stored together with experts of another modality",
    "openai_privacy_filter": "generates no text token by token",
} | {name: miss.message for name, miss in REFUSED.items()}
"""Family -> a part of the reason why it is rejected."""


def choose(model: Any, num_experts: int, seed: int = 1) -> dict[str, Sequence[int]]:
    """Return three quarters of the experts of each block, equally many of each group."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, Sequence[int]] = {}
    for site in find_routers(model).sites:
        num_groups = 1 if site.facts.groups is None else site.facts.groups.num_groups
        size = num_experts // num_groups
        kept[block_of(site.name)] = [
            group * size + expert
            for group in range(num_groups)
            for expert in sorted(
                torch.randperm(size, generator=generator).tolist()[: size * 3 // 4]
            )
        ]
    return kept


@torch.no_grad()
def prefill(model: Any) -> Tensor:
    """Return the logits of two short texts."""
    ids = torch.randint(10, 8_000, (2, 12), generator=torch.Generator().manual_seed(1))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def prune_and_compare(folder: Path, output: Path) -> None:
    """Prune a checkpoint, and compare its logits with those of the masked original."""
    checkpoint = open_checkpoint(str(folder))
    original, _ = load_model(str(folder), device="cpu")
    check_routers(checkpoint, find_routers(original), folder.name)
    kept = choose(original, checkpoint.num_experts)
    write_pruned(checkpoint, kept, {}, output)
    pruned, _ = load_model(str(output), device="cpu")
    removed = checkpoint.num_experts - len(next(iter(kept.values())))
    assert removed == 4
    before, after = (find_routers(model).num_experts for model in (original, pruned))
    assert before - after == removed
    plain = prefill(original)
    with without_experts(original, checkpoint, kept):
        masked = prefill(original)
    assert not torch.allclose(plain, masked, atol=1e-3), "removing experts did nothing"
    torch.testing.assert_close(prefill(pruned), masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", family_names())
def test_a_pruned_checkpoint_equals_its_masked_original(family: str, tmp_path: Path) -> None:
    if family == "openai_privacy_filter":  # it has no class that generates, to save it in
        tiny_model(family).save_pretrained(tmp_path / family)
    else:
        save_tiny(family, tmp_path / family)
    if family not in NOT_PRUNED:
        prune_and_compare(tmp_path / family, tmp_path / "pruned")
        return
    with pytest.raises(ModelError, match=NOT_PRUNED[family]):
        prune_and_compare(tmp_path / family, tmp_path / "pruned")
    assert [path.name for path in tmp_path.iterdir()] == [family]


@newest_only
def test_enough_families_can_be_pruned() -> None:
    assert len({*family_names()} - NOT_PRUNED.keys()) >= 63


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "nemotron_h"])
def test_experts_stored_as_one_tensor_are_pruned_too(family: str, tmp_path: Path) -> None:
    model, _ = load_model(str(save_tiny(family, tmp_path / "numbered")), device="cpu")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / file, tmp_path / "fused")
    numbers = [t.number_at for t in open_checkpoint(str(tmp_path / "fused")).tensors]
    assert numbers == [None] * len(numbers)
    prune_and_compare(tmp_path / "fused", tmp_path / "pruned")
