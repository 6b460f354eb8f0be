"""Checkpoints that a server must reject."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save_file

Change = Callable[[dict[str, Any]], None]


def turn(tensors: dict[str, Any]) -> None:
    """Make the routers another model's."""
    tensors["model.layers.3.mlp.gate.weight"] *= 1.25


def damage(tensors: dict[str, Any]) -> None:
    """Make a weight NaN."""
    tensors["model.layers.2.mlp.experts.7.up_proj.weight"][3, 5] = float("nan")


def blow_up(tensors: dict[str, Any]) -> None:
    """Make router logits infinite, by finite weights."""
    norm = tensors["model.layers.1.post_attention_layernorm.weight"]
    norm *= 3e38 / norm.abs().max()


SENTENCES: Final = {
    "turn": "calibration was made for routers",
    "damage": "has or gives NaN or infinite values; the checkpoint is damaged",
    "blow_up": "the router of model.layers.1.",
}


def changed_checkpoint(folder: Path, checkpoint: str, change: Change) -> str:
    """Write a changed copy of a checkpoint, and return its folder."""
    folder.mkdir()
    for path in Path(checkpoint).iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(Path(checkpoint) / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
