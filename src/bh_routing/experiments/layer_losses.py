"""What a model loses when one layer alone keeps fewer experts: how a budget is shared out.

Axes: L layers, C counts of experts that were measured, K all counts from 1 to the model's own k,
B curves that a loss is a sum of.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from tqdm import tqdm

from bh_routing.engine.score import score
from bh_routing.experiments.quality import QualityText
from bh_routing.models.discovery import find_routers
from bh_routing.rules.per_layer_top_k import PerLayerTopK

LAYER_TOKENS: Final = 2_000
"""Tokens of calibration text that each pass reads."""
MAX_PASSES: Final = 120
"""Passes over them, unless a model has more than half as many layers: two a layer are the least."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerLosses:
    """Losses in nats a token against the model's own top-k."""

    model_top_k: int
    counts: tuple[int, ...]
    """Experts that a layer was cut down to, ascending, all below the model's own k."""
    by_layer: tuple[tuple[float, ...], ...]
    """Of each layer, the loss at each of these counts."""

    def share_out(self, mean_experts: float) -> PerLayerTopK:
        """Return the per-layer top-k of this mean that should lose least if losses add.

        Measured losses are smoothed: on few tokens one expert less can seem to cost nothing, and
        the whole allocation would hang on it.
        """
        if not self.counts:
            return PerLayerTopK((1,) * len(self.by_layer))
        measured_LC = np.array(self.by_layer)
        # Relative errors: a loss at one expert is a hundred times that at one below all.
        scale_C = np.maximum(np.abs(measured_LC).mean(axis=0), 1e-12)
        some_CB = _convex_shapes(np.array(self.counts), self.model_top_k)
        all_KB = _convex_shapes(np.arange(1, self.model_top_k + 1), self.model_top_k)
        fits_LB = [nnls(some_CB / scale_C[:, None], row / scale_C)[0] for row in measured_LC]
        return PerLayerTopK.from_losses(mean_experts, [(all_KB @ fit).tolist() for fit in fits_LB])

    def to_document(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "model_top_k": self.model_top_k,
            "counts": list(self.counts),
            "by_layer": [list(losses) for losses in self.by_layer],
        }

    @classmethod
    def recall(cls, documents: Iterable[Mapping[str, Any]], search: str) -> LayerLosses | None:
        """Find the losses that an earlier search of the same kind kept with a setting."""
        for entry in documents:
            try:
                if entry["search"] == search:
                    kept = entry["layer_losses"]
                    by_layer = tuple(tuple(map(float, losses)) for losses in kept["by_layer"])
                    return cls(int(kept["model_top_k"]), tuple(map(int, kept["counts"])), by_layer)
            except (KeyError, TypeError, ValueError):
                continue
        return None


def _convex_shapes(counts_C: NDArray[Any], model_top_k: int) -> NDArray[Any]:
    """Curves of loss against experts, zero at the model's own k; sums of them are convex too."""
    powers_B = np.array([1.0, 2.0, 4.0])
    return np.asarray(counts_C[:, None] ** -powers_B - model_top_k**-powers_B)


def counts_to_measure(model_top_k: int, num_layers: int) -> tuple[int, ...]:
    """Spread as many counts as MAX_PASSES allows evenly from 1 to below the model's own k.

    Example:
        >>> counts_to_measure(8, num_layers=6), counts_to_measure(8, num_layers=48)
        ((1, 2, 3, 4, 5, 6, 7), (1, 4))
    """
    most = min(model_top_k - 1, max(2, MAX_PASSES // num_layers))
    return tuple(1 + i * (model_top_k - 1) // most for i in range(most))


def measure_layer_losses(model: Any, tokenizer: Any, text: QualityText) -> LayerLosses:
    """Run the model once for each layer and count, every other layer keeping the model's own k.

    Args:
        model, tokenizer: as `score` takes them.
        text: what is read; LAYER_TOKENS are enough.
    """
    routers = find_routers(model)
    num_layers, model_top_k = len(routers.sites), routers.model_top_k
    counts = counts_to_measure(model_top_k, num_layers)
    if len(counts) < model_top_k - 1:
        log.info(
            "losses by layer are measured at %s of %d experts only, for %d layers",
            "/".join(map(str, counts)), model_top_k, num_layers,
        )  # fmt: skip
    rules = {
        f"{layer}@{count}": PerLayerTopK(
            tuple(count if other == layer else model_top_k for other in range(num_layers))
        )
        for layer in range(num_layers)
        for count in counts
    }
    rises = dict.fromkeys(rules, 0.0)
    num_tokens = sum(len(document.ids) for document in text.documents)
    records = score(model, tokenizer, text.documents, rules, window=text.window, stride=text.stride)
    total = num_tokens * len(rules)
    with tqdm(total=total, unit="token", desc="layers", unit_scale=True) as bar:
        for record in records:
            rises[record.config_name] += record.nll_sum - record.top_k_nll_sum
            bar.update(record.tokens)
    return LayerLosses(
        model_top_k=model_top_k,
        counts=counts,
        by_layer=tuple(
            tuple(rises[f"{layer}@{count}"] / num_tokens for count in counts)
            for layer in range(num_layers)
        ),
    )
