"""Score every expert of a model on text, and test which of them don't matter to it.

Axes: D documents, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bh_routing.engine.calibrate import cut_windows, tokenize_distinct
from bh_routing.engine.observe import LayerSlots, SlotObserver
from bh_routing.engine.texts import Document
from bh_routing.engine.windows import spread_tokens
from bh_routing.errors import CalibrationError, InputError
from bh_routing.models.capture import evaluating
from bh_routing.models.routers import find_routers, reject_routed
from bh_routing.multitest.step_up import benjamini_hochberg
from bh_routing.stats.bootstrap import RESAMPLES
from bh_routing.stats.clustered import MIN_CLUSTERS, estimate_ratio

Score = Literal["reap", "fisher_mass", "frequency", "random"]

MEANINGS: Final[dict[Score, str]] = {
    "reap": "mean over the tokens routed to an expert of its weight times the norm of its output",
    "fisher_mass": (
        "sum over tokens of (weight x root mean square of dL/dweight)^2, an estimate of twice the "
        "loss of leaving the expert out"
    ),
    "frequency": "number of tokens routed to an expert",
    "random": "a random order, as a control",
}
"""Definitions; sums are over the slots that the model's own top-k gives an expert."""

_COLUMNS: Final = 1_024
"""Experts tested at a time: each takes 10,000 resampled means in memory."""
_SMALLEST_WEIGHT: Final = 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertUse:
    """Use of every expert on text, under the model's own top-k; float64."""

    counts_LE: Tensor
    """Tokens routed to the expert."""
    contributions_LE: Tensor
    """Sum of weight times output norm."""
    squares_LE: Tensor
    """Sum of (dL/dweight)^2; zeros without gradients."""
    squared_weights_DLE: Tensor
    """Sum of squared weights in each document."""
    tokens_D: Tensor
    clusters: tuple[str, ...]
    """The cluster of each document."""

    @property
    def fisher_masses_DLE(self) -> Tensor:
        """Fisher mass in each document: squared weights times the mean of (dL/dweight)^2."""
        return self.squared_weights_DLE * (self.squares_LE / self.counts_LE.clamp_min(1))

    def scores(self, score: Score, seed: int) -> Tensor:
        """Return the scores of all experts, shape (L, E); the higher, the better to keep.

        Source: "reap" is equation (9) of Lasby et al. (2025), arXiv:2510.13999.
        """
        if score == "reap":
            return self.contributions_LE / self.counts_LE.clamp_min(1)
        if score == "fisher_mass":
            return self.fisher_masses_DLE.sum(0)
        if score == "frequency":
            return self.counts_LE
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.counts_LE.shape, generator=generator, dtype=torch.float64)


def observe_experts(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    by_loss: bool,
    max_tokens: int,
) -> ExpertUse:
    """Run the model over text and sum up the use of every expert.

    Args:
        model: a transformers model with routers, not inside `route`.
        tokenizer: its tokenizer.
        documents: the text.
        by_loss: whether to observe gradients of the loss too, which `fisher_mass` needs.
        max_tokens: total number of tokens, spread evenly over the documents.
    Raises:
        InputError: there is no text.
        ModelError: the model has no routers, or they are inside `route`.
        CalibrationError: a value isn't finite, or the model gives no gradients.
    """
    routers = find_routers(model)
    reject_routed(site.module for site in routers.sites)
    read = tokenize_distinct(tokenizer, [document.text for document in documents])
    taken = spread_tokens([len(ids) for ids in read.values()], max_tokens)
    shape = (len(routers.sites), routers.num_experts)
    counts_LE, contributions_LE, squares_LE = torch.zeros(3, *shape, dtype=torch.float64)
    squared_weights_DLE = torch.zeros(len(read), *shape, dtype=torch.float64)
    observer = SlotObserver(model, routers, by_loss=by_loss)
    try:
        with evaluating(model):
            windows = cut_windows(model, list(read.values()), taken)
            for number, window in tqdm(windows, desc="experts", unit="window"):
                for layer, slots in enumerate(observer.read(window.to(model.device))):
                    _add(counts_LE[layer], slots, torch.ones_like(slots.weights))
                    _add(contributions_LE[layer], slots, slots.weights * slots.norms)
                    _add(squared_weights_DLE[number, layer], slots, slots.weights.square())
                    if by_loss:
                        ratios = slots.losses / slots.weights.clamp_min(_SMALLEST_WEIGHT)
                        _add(squares_LE[layer], slots, ratios.square())
    finally:
        observer.close()
    use = ExpertUse(
        counts_LE=counts_LE, contributions_LE=contributions_LE, squares_LE=squares_LE,
        squared_weights_DLE=squared_weights_DLE, tokens_D=torch.tensor(taken),
        clusters=tuple({d.text: d.cluster for d in documents}[text] for text in read),
    )  # fmt: skip
    if not bool((contributions_LE + squares_LE).isfinite().all()):
        raise CalibrationError(
            "some expert's output or gradient is NaN or infinite on the text; the checkpoint is "
            "damaged or the dtype too narrow: try float32"
        )
    return use


def _add(sums_E: Tensor, slots: LayerSlots, values: Tensor) -> None:
    sums_E.index_add_(0, slots.experts.flatten(), values.flatten().double())


def find_unneeded(use: ExpertUse, alpha: float, seed: int) -> Tensor:
    """Return which experts of the model don't matter to the text, bool, shape (L, E).

    An expert matters if its Fisher mass per token is at least that of the model's median expert.
    Hypothesis "this expert matters to the text": a one-sided test of the mean over clusters of
    documents. Benjamini-Hochberg over all experts of the model rejects it at level alpha, so alpha
    bounds the expected fraction of rejected experts that matter.

    Args:
        use: the experts' use, observed with the loss.
        alpha: target false discovery rate, in (0, 1).
        seed: seed of the bootstrap over clusters.
    Raises:
        InputError: alpha is outside (0, 1), or there are too few clusters for a test.
    """
    num_clusters = len({*use.clusters})
    if num_clusters < MIN_CLUSTERS:
        raise InputError(
            f"alpha needs text of at least {MIN_CLUSTERS} independent documents, got "
            f"{num_clusters}; give more, or set keep"
        )
    masses_DR = use.fisher_masses_DLE.flatten(1).numpy()
    tokens_D = use.tokens_D.numpy()
    totals_R = masses_DR.sum(0)
    median = float(np.median(totals_R / tokens_D.sum()))
    p_R = np.concatenate(
        [
            estimate_ratio(
                masses_DR[:, start : start + _COLUMNS], tokens_D, use.clusters, seed=seed
            ).p_below(median)
            for start in range(0, masses_DR.shape[1], _COLUMNS)
        ]
    )
    # An expert that no token uses has no spread, so no test: it gets the smallest possible p.
    p_R = np.where(totals_R == 0, 1 / (RESAMPLES + 1), np.nan_to_num(p_R, nan=1.0))
    rejected_R = benjamini_hochberg(torch.from_numpy(p_R), alpha)
    return rejected_R.view(use.counts_LE.shape)


def best_experts(scores_LE: Tensor, keep: int, num_groups: int = 1) -> Tensor:
    """Return the `keep` experts of highest score of each layer, ascending; the first of equals.

    Args:
        scores_LE: scores of the routed experts.
        keep: number of experts per layer.
        num_groups: groups of the router; each keeps equally many experts.
    Returns:
        int64 (L, keep).
    """
    num_layers, num_experts = scores_LE.shape
    of_group_LGE = scores_LE.view(num_layers, num_groups, -1)
    order_LGE = of_group_LGE.argsort(dim=-1, descending=True, stable=True)
    starts_G1 = torch.arange(0, num_experts, num_experts // num_groups)[:, None]
    kept = order_LGE[..., : keep // num_groups] + starts_G1
    return kept.flatten(1).sort(dim=-1).values
