"""Observe every slot of the untouched model: its weight, its expert's output, what it mattered.

Axes: B windows, S positions, T tokens, H hidden, K slots, L layers, E experts, M slots of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from bh_routing.errors import CalibrationError
from bh_routing.models.discovery import Routers
from bh_routing.models.experts import decoder_layer_of, slot_output_norms
from bh_routing.models.sites import Callback, Decision, Proposal, RouterSite
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.contributions import Contributions, Definition, Statistic

_SMALLEST_NORM: Final = 1e-30


class _LayerSlots(NamedTuple):
    """Slots of one layer, each field on the host, shape (M,)."""

    experts: Tensor
    weights: Tensor
    norms: Tensor
    """The slot's true output norm, at weight 1."""
    residuals: Tensor
    """The norm of its token's residual stream behind the layer."""
    losses: Tensor
    """|dL/dw x w|; empty without gradients."""


class SlotObserver:
    """Hooks that see each slot of every layer; memory is 20 bytes a slot on the host.

    With `by_loss` the forward pass must run with gradients enabled and `backward` be called on
    its loss before the next one.
    """

    def __init__(self, model: nn.Module, routers: Routers, *, by_loss: bool) -> None:
        self._routers = routers
        self._by_loss = by_loss
        self._seen: list[list[_LayerSlots]] = [[] for _ in routers.sites]
        self._open: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._switches: dict[int, Tensor] = {}
        self._residuals: dict[int, Tensor] = {}
        self._undo = ExitStack()
        for site in routers.sites:
            layer = decoder_layer_of(model, site)
            hooks = (
                site.experts.register_forward_hook(self._on_experts(site)),
                layer.register_forward_hook(self._on_layer(site)),
            )
            for hook in hooks:
                self._undo.callback(hook.remove)
            if by_loss:
                self._undo.callback(site.watch(self._on_router(site)))

    def close(self) -> None:
        """Take every hook out again."""
        self._undo.close()

    def finish_window(self) -> None:
        """Move what the last forward pass (and its backward pass) left to the host."""
        for layer, (index_TK, weights_TK, norms_TK) in self._open.items():
            residual_T = self._residuals[layer]
            losses_TK = torch.empty(0)
            if self._by_loss:
                gradient_TK = self._switches[layer].grad
                assert gradient_TK is not None  # our own bug: no backward pass was made
                losses_TK = gradient_TK.abs()
            columns = (
                index_TK,
                weights_TK.float(),
                norms_TK,
                residual_T[:, None].expand_as(norms_TK),
                losses_TK,
            )
            self._seen[layer].append(_LayerSlots(*(c.detach().flatten().cpu() for c in columns)))
        self._open.clear()
        self._switches.clear()
        self._residuals.clear()

    def contributions(self, capacity: int, seed: int) -> Contributions:
        """Summarize everything seen; at most `capacity` scores a table, drawn by `seed`."""
        layers = [_LayerSlots(*map(torch.cat, zip(*seen, strict=True))) for seen in self._seen]
        return summarize(layers, self._routers.num_experts, capacity, seed)

    def _on_router(self, site: RouterSite) -> Callback:
        def switch(proposal: Proposal) -> Decision:
            weights_TK = proposal.top_k_weights_TK
            # d loss / d switch at 1 is w * d loss / d w: what leaving the slot out changes.
            switch_TK = torch.ones_like(weights_TK, requires_grad=True)
            self._switches[site.layer] = switch_TK
            return Decision(
                proposal.top_k_index_TK, weights_TK * switch_TK, proposal.shared_weights_TS
            )

        return switch

    def _on_experts(self, site: RouterSite) -> Callable[..., None]:
        def hook(experts: nn.Module, inputs: tuple[Tensor, ...], _: Any) -> None:
            hidden, index_TK, weights_TK = (tensor.detach() for tensor in inputs[:3])
            hidden_TH = hidden.reshape(len(index_TK), -1)
            norms_TK = slot_output_norms(experts, hidden_TH, index_TK, weights_TK.dtype)
            self._open[site.layer] = (index_TK, weights_TK, norms_TK)

        return hook

    def _on_layer(self, site: RouterSite) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            stream = output if isinstance(output, Tensor) else output[0]
            # A stream of several lanes has one more axis; its norm is that of all lanes.
            num_tokens = stream.shape[0] * stream.shape[1]
            self._residuals[site.layer] = (
                stream.detach().float().reshape(num_tokens, -1).norm(dim=-1)
            )

        return hook


def summarize(
    layers: list[_LayerSlots], num_experts: int, capacity: int, seed: int
) -> Contributions:
    """Turn slots into scales and reference tables."""
    norms_LE = torch.stack([_mean_by_expert(s, s.norms, num_experts) for s in layers])
    residuals_L = torch.stack([s.residuals.mean() for s in layers]).clamp_min(_SMALLEST_NORM)
    scales: dict[Statistic, Tensor] = {
        "contribution": norms_LE / residuals_L[:, None],
        "weight": torch.ones_like(norms_LE),
    }
    truths: dict[Definition, Tensor] = {
        "norm": torch.cat(
            [s.weights * s.norms / s.residuals.clamp_min(_SMALLEST_NORM) for s in layers]
        )
    }
    if all(s.losses.numel() for s in layers):
        truths["loss"] = torch.cat([s.losses for s in layers])
        squares = [(s, (s.losses / s.weights.clamp_min(_SMALLEST_NORM)).square()) for s in layers]
        by_expert = [_mean_by_expert(s, square, num_experts) for s, square in squares]
        scales["sensitivity"] = torch.stack(by_expert).sqrt()
        of_layer_L1 = torch.stack([square.mean().sqrt() for _, square in squares])[:, None]
        scales["layer_sensitivity"] = norms_LE / norms_LE.mean(dim=1, keepdim=True) * of_layer_L1
    for name, values in (*scales.items(), *truths.items()):
        if not bool(values.isfinite().all()):
            raise CalibrationError(
                f"the {name} of some slot is NaN or infinite on the calibration text; the "
                "checkpoint is damaged or the dtype too narrow: try --no-fp16"
            )
    scores = {
        name: torch.cat([s.weights * scale_LE[i, s.experts] for i, s in enumerate(layers)])
        for name, scale_LE in scales.items()
    }
    return Contributions(
        residual_norms_L=residuals_L,
        scales=scales,
        all_scores={name: _sample(values, capacity, seed) for name, values in scores.items()},
        needed_scores={
            (name, definition): _sample(values[truth > truth.median()], capacity, seed + 1)
            for name, values in scores.items()
            for definition, truth in truths.items()
        },
    )


def _mean_by_expert(slots: _LayerSlots, values: Tensor, num_experts: int) -> Tensor:
    """Mean over the slots of each expert; the layer's mean for one that was never chosen."""
    sums_E = torch.zeros(num_experts, dtype=torch.float64)
    sums_E.index_add_(0, slots.experts, values.double())
    counts_E = torch.bincount(slots.experts, minlength=num_experts)
    means_E = torch.where(counts_E > 0, sums_E / counts_E.clamp_min(1), values.double().mean())
    return means_E.float()


def _sample(scores: Tensor, capacity: int, seed: int) -> ReferenceTable:
    if scores.numel() > capacity:
        order = torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(seed))
        scores = scores[order[:capacity]]
    return ReferenceTable.from_scores(scores)
