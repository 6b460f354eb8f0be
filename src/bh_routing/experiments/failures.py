"""What goes wrong on a device: no memory left, and numbers that are none."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from bh_routing.models.routing import bind_rule, install
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import Candidates, Rule, Selector

OUT_OF_MEMORY: Final = (
    "out of memory; use --device cpu, a smaller batch size, fewer tokens, or a smaller dtype than "
    "float32"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the device or the machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU torch raises a plain RuntimeError, with only its text to go by.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give unused memory back, to the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find_nan(
    model: Any, rule: Rule, calibration: Calibration | None, token_ids: Sequence[int]
) -> str:
    """Run tokens again, and say in one sentence where NaN or infinity begins.

    Args:
        model, rule, calibration: as `route` takes them.
        token_ids: a text that gave NaN.
    """
    bound = bind_rule(model, rule, calibration)
    is_finite: dict[str, Tensor] = {}

    def watched(name: str, select: Selector) -> Selector:
        def note(candidates: Candidates) -> Tensor:
            is_finite[name] = candidates.router_logits_TE.isfinite().all()
            return select(candidates)

        return note

    names = [f"{site.name} (layer {site.layer})" for site in bound.routers.sites]
    selectors = tuple(map(watched, names, bound.selectors))
    with torch.inference_mode(), install(model, replace(bound, selectors=selectors)):
        model(torch.tensor([list(token_ids)], device=model.device), use_cache=False)
    first = next((name for name in names if name in is_finite and not is_finite[name]), None)
    where = "the model's output is NaN, though every router's logits are finite"
    if first is not None:
        where = f"router {first} gave NaN or infinite logits"
    return f"{where}; the checkpoint is damaged or the dtype too narrow: try float32"
