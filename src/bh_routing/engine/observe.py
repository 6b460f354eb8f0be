"""Observe each slot's contribution in the unmodified model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from bh_routing.errors import CalibrationError
from bh_routing.models.experts import decoder_layer_of, slot_output_norms
from bh_routing.models.routers import Routers
from bh_routing.models.sites import Callback, Decision, Proposal, RouterSite
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.contributions import Contributions, Definition, Statistic

_SMALLEST_NORM: Final = 1e-30


class LayerSlots(NamedTuple):
    """Slots of one layer, on the host; each field has shape (T, K), or (M,) after joining."""

    experts: Tensor
    weights: Tensor
    norms: Tensor
    """True output norm of the slot, at weight 1."""
    residuals: Tensor
    """Norm of the token's residual stream after the layer."""
    losses: Tensor
    """|dL/dw x w|; empty without gradients."""

    def truth(self, definition: Definition) -> Tensor:
        """Return each slot's contribution; slots above the cut count as needed."""
        if definition == "loss":
            return self.losses
        return self.weights * self.norms / self.residuals.clamp_min(_SMALLEST_NORM)


class SlotObserver:
    """Hooks that observe each slot of every layer; they take 20 bytes per slot on the host."""

    def __init__(self, model: nn.Module, routers: Routers, *, by_loss: bool) -> None:
        self._model = model
        self._routers = routers
        self._by_loss = by_loss
        self._open: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._switches: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
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
        """Remove all hooks."""
        self._undo.close()

    def read(self, ids_1S: Tensor) -> list[LayerSlots]:
        """Run the model over one window, with a backward pass of its loss if requested.

        Args:
            ids_1S: token ids on the model's device, shape (1, S).
        Returns:
            The slots of each layer; empty if a loss is requested and there is no next token.
        Raises:
            CalibrationError: a loss is requested and the model gives no gradients.
        """
        if not self._by_loss:
            with torch.no_grad():
                self._model(ids_1S, use_cache=False, logits_to_keep=1)
        elif ids_1S.shape[1] > 1:
            with torch.enable_grad():
                logits = self._model(ids_1S, use_cache=False).logits[0, :-1].float()
                loss = nn.functional.cross_entropy(logits, ids_1S[0, 1:], reduction="sum")
            if not loss.requires_grad:
                raise CalibrationError(
                    "this model's layers give no gradients, which 'needed_by_loss' is made from; "
                    "calibrate 'needed' and use statistic: contribution"
                )
            # Not backward(), which would accumulate into the weights' gradients.
            switches = [self._switches[layer] for layer in self._open]
            self._gradients = dict(
                zip(self._open, torch.autograd.grad(loss, switches), strict=True)
            )
        return self._take()

    def _take(self) -> list[LayerSlots]:
        """Move the records of the last forward (and backward) pass to the host."""
        taken = []
        for layer, (index_TK, weights_TK, norms_TK) in self._open.items():
            losses_TK = torch.empty(0)
            if self._by_loss:
                losses_TK = self._gradients[layer].float().abs()
            columns = (
                index_TK,
                weights_TK.float(),
                norms_TK,
                self._residuals[layer][:, None].expand_as(norms_TK),
                losses_TK,
            )
            taken.append(LayerSlots(*(column.detach().cpu() for column in columns)))
        self._open.clear()
        self._switches.clear()
        self._gradients.clear()
        self._residuals.clear()
        return taken

    def _on_router(self, site: RouterSite) -> Callback:
        def switch(proposal: Proposal) -> Decision:
            weights_TK = proposal.top_k_weights_TK
            # d loss / d switch at 1 is w * d loss / d w: the effect of leaving the slot out.
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
            # A stream with several lanes has one more axis; the norm is over all lanes.
            num_tokens = stream.shape[0] * stream.shape[1]
            self._residuals[site.layer] = (
                stream.detach().float().reshape(num_tokens, -1).norm(dim=-1)
            )

        return hook


def join_windows(windows: Sequence[list[LayerSlots]]) -> list[LayerSlots]:
    """Concatenate the slots of all windows, layer by layer."""
    return [
        LayerSlots(
            *(torch.cat([t.flatten() for t in column]) for column in zip(*seen, strict=True))
        )
        for seen in zip(*(layers for layers in windows if layers), strict=True)
    ]


def summarize(
    layers: list[LayerSlots], num_experts: int, capacity: int, seed: int
) -> Contributions:
    """Compute scales and reference tables from joined slots.

    Args:
        layers: the slots of each layer.
        num_experts: number of experts per layer.
        capacity: maximum number of scores in a table.
        seed: seed of the sample if there are more scores.
    Returns:
        Scales, reference scores and cuts for the rules.
    Raises:
        CalibrationError: a value isn't finite; the message names the statistic.
    """
    norms_LE = torch.stack([_mean_by_expert(s, s.norms, num_experts) for s in layers])
    residuals_L = torch.stack([s.residuals.mean() for s in layers]).clamp_min(_SMALLEST_NORM)
    scales: dict[Statistic, Tensor] = {
        "contribution": norms_LE / residuals_L[:, None],
        "weight": torch.ones_like(norms_LE),
    }
    truths: dict[Definition, Tensor] = {"norm": torch.cat([s.truth("norm") for s in layers])}
    if all(s.losses.numel() for s in layers):
        truths["loss"] = torch.cat([s.truth("loss") for s in layers])
        squares = [(s, (s.losses / s.weights.clamp_min(_SMALLEST_NORM)).square()) for s in layers]
        by_expert = [_mean_by_expert(s, square, num_experts) for s, square in squares]
        scales["sensitivity"] = torch.stack(by_expert).sqrt()
        of_layer_L1 = torch.stack([square.mean().sqrt() for _, square in squares])[:, None]
        scales["layer_sensitivity"] = norms_LE / norms_LE.mean(dim=1, keepdim=True) * of_layer_L1
    for name, values in (*scales.items(), *truths.items()):
        if not bool(values.isfinite().all()):
            raise CalibrationError(
                f"the {name} of some slot is NaN or infinite on the calibration text; the "
                "checkpoint is damaged or the dtype too narrow: try float32"
            )
    scores = {
        name: torch.cat([s.weights * scale_LE[i, s.experts] for i, s in enumerate(layers)])
        for name, scale_LE in scales.items()
    }
    cuts = {definition: float(truth.median()) for definition, truth in truths.items()}
    return Contributions(
        residual_norms_L=residuals_L,
        scales=scales,
        all_scores={name: _sample(values, capacity, seed) for name, values in scores.items()},
        needed_scores={
            (name, definition): _sample(values[truth > cuts[definition]], capacity, seed + 1)
            for name, values in scores.items()
            for definition, truth in truths.items()
        },
        cuts=cuts,
    )


def _mean_by_expert(slots: LayerSlots, values: Tensor, num_experts: int) -> Tensor:
    """Return the mean over each expert's slots; the layer's mean if it was never chosen."""
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
