"""Fit the nulls' reference distributions on text, in one pass of the untouched model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bh_routing.engine.texts import text_sha256
from bh_routing.engine.windows import spread_tokens
from bh_routing.errors import CalibrationError, InputError
from bh_routing.models.discovery import RouterSite, find_routers, model_fingerprint
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.catalog import get_null
from bh_routing.nulls.reservoir import Reservoir, reservoir_capacity


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    nulls: Sequence[str] = ("background", "pooled"),
    max_tokens: int = 16_384,
    seed: int = 0,
) -> Calibration:
    """Collect each null's background scores, layer by layer, on calibration text.

    Args:
        model: a transformers model with routers, not inside `route`.
        tokenizer: its tokenizer.
        texts: documents; the more different, the better the reference.
        nulls: names of the nulls to fit, of those that need a table.
        max_tokens: tokens used in all, spread over the documents as evenly as their lengths
            allow.
        seed: of the sampling that keeps a table at its fixed size.
    Returns:
        A new calibration that fits this model only.
    Raises:
        InputError: there is no text.
        CalibrationError: router logits aren't finite, with the layer's name.
    """
    routers = find_routers(model)
    documents = [ids for text in texts if (ids := tokenizer(text, verbose=False)["input_ids"])]
    if not documents:
        raise InputError("the calibration text is empty; give at least one document")
    capacity = reservoir_capacity(routers.num_experts)
    reservoirs = {
        (name, site.layer): Reservoir(capacity, seed=(seed, number, site.layer))
        for number, name in enumerate(nulls)
        for site in routers.sites
    }
    context = int(getattr(model.config, "max_position_embeddings", None) or 2048)
    taken = spread_tokens([len(ids) for ids in documents], max_tokens)
    handles = [
        site.module.register_forward_hook(_collecting_hook(site, nulls, reservoirs))
        for site in routers.sites
    ]
    try:
        with torch.inference_mode():
            for ids, length in zip(documents, taken, strict=True):
                for start in range(0, length, context):
                    window = torch.tensor([ids[start : min(start + context, length)]])
                    model(window.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    tables = {
        null: tuple(reservoirs[null, s.layer].table() for s in routers.sites) for null in nulls
    }
    return Calibration(
        tables=tables,
        num_layers=len(routers.sites),
        num_experts=routers.num_experts,
        model_top_k=routers.model_top_k,
        model_fingerprint=model_fingerprint(model),
        text_sha256=text_sha256(texts),
        num_tokens=sum(taken),
        num_documents=len(documents),
        seed=seed,
        table_capacity=capacity,
    )


def _collecting_hook(
    site: RouterSite, nulls: Sequence[str], reservoirs: Mapping[tuple[str, int], Reservoir]
) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
        logits_TE, index_TK = output[0], output[2]
        if not bool(torch.isfinite(logits_TE).all()):
            raise CalibrationError(
                f"router {site.name} gave NaN or infinite logits on the calibration text; "
                "the checkpoint is damaged or the dtype too narrow: try --no-fp16"
            )
        for null in nulls:
            reference = get_null(null).reference(logits_TE.float(), index_TK)
            reservoirs[null, site.layer].add(reference)

    return hook
