"""Observe the unmodified model: its routers' proposals and each slot's contribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

import torch
from torch import Tensor, nn

from bh_routing.engine.windows import TokenizedDocument, cut_windows, prefix_token
from bh_routing.errors import CalibrationError
from bh_routing.models.capture import evaluating
from bh_routing.models.experts import decoder_layer_of, slot_output_norms
from bh_routing.models.routers import Routers, find_routers
from bh_routing.models.routing import route
from bh_routing.models.sites import Callback, Decision, Proposal, RouterSite
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.contributions import NEEDED, Contributions, Definition, Statistic
from bh_routing.rules.base import Candidates, LayerContext, MixingRule, Rows, Rule, Selector, Unit

MEMORY_BYTES: Final = 2**30
"""Maximum memory for the proposals of a text."""
_SLOT_BYTES: Final = 16  # index, weight and norm
_ROW_BYTES: Final = 16  # sequence and position


@dataclass(frozen=True, slots=True)
class Proposals:
    """Candidates of every layer for the same tokens, on their layers' devices."""

    layers: tuple[Candidates, ...]
    counted_T: Tensor
    """Bool: False for tokens that are context only."""


@dataclass(frozen=True, eq=False)
class _Recorder(MixingRule):
    """Keeps all slots and records the proposals."""

    method: ClassVar[str] = "recorder"
    seen: tuple[list[Candidates], ...]
    num_slots: int
    with_norms: bool

    @property
    def unit(self) -> Unit:
        return "block"

    @property
    def needs_output_norms(self) -> bool:
        return self.with_norms

    def most_kept(self, model_top_k: int) -> int:
        return self.num_slots

    def bind(self, context: LayerContext) -> Selector:
        mine = self.seen[context.layer]

        def select(candidates: Candidates) -> Tensor:
            mine.append(candidates)
            return torch.ones_like(candidates.top_k_index_TK, dtype=torch.bool)

        return select


def tokens_that_fit(routers: Routers) -> int:
    """Return the number of tokens whose proposals fit into MEMORY_BYTES."""
    layer_bytes = 4 * routers.num_experts + _SLOT_BYTES * routers.model_top_k + _ROW_BYTES
    return MEMORY_BYTES // (len(routers.sites) * layer_bytes)


@torch.inference_mode()
def capture_proposals(
    model: Any,
    tokenizer: Any,
    documents: Sequence[TokenizedDocument],
    *,
    window: int,
    num_candidates: int,
    with_norms: bool = False,
) -> Proposals:
    """Run the unmodified model over documents and return its routers' proposals.

    Args:
        model: a transformers model with routers, not inside `route`.
        tokenizer: its tokenizer, for the prefix token.
        documents: text of at most `tokens_that_fit` tokens.
        window: maximum number of input tokens per forward pass.
        num_candidates: slots that the routers propose, at least the model's own k.
        with_norms: run every candidate expert and keep the norm of its output.
    Raises:
        InputError: the tokenizer has no prefix token.
    """
    routers = find_routers(model)
    seen: tuple[list[Candidates], ...] = tuple([] for _ in routers.sites)
    counted = []
    with evaluating(model), route(model, _Recorder(seen, num_candidates, with_norms)):
        for part in cut_windows(documents, prefix_token(tokenizer), window, stride=window):
            ids = torch.tensor([part.ids[:-1]], device=model.device)
            model(ids, use_cache=False, logits_to_keep=1)
            counted.append(torch.arange(ids.shape[1], device=ids.device) >= part.first_scored)
    return Proposals(tuple(_join(calls) for calls in seen), torch.cat(counted))


def _join(calls: list[Candidates]) -> Candidates:
    norms = [c.output_norms_TK for c in calls if c.output_norms_TK is not None]
    rows = [c.rows for c in calls if c.rows is not None]
    joined = Candidates(
        router_logits_TE=torch.cat([c.router_logits_TE for c in calls]),
        top_k_index_TK=torch.cat([c.top_k_index_TK for c in calls]),
        top_k_weights_TK=torch.cat([c.top_k_weights_TK for c in calls]),
        output_norms_TK=torch.cat(norms) if norms else None,
        # Each call is one window, a separate sequence.
        rows=Rows(
            torch.cat([torch.full_like(r.sequence_T, call) for call, r in enumerate(rows)]),
            torch.cat([r.position_T for r in rows]),
        ),
    )
    calls.clear()  # so that only one layer at a time is in memory twice
    return joined


@torch.inference_mode()
def mean_experts(
    rule: Rule, proposals: Proposals, routers: Routers, calibration: Calibration | None = None
) -> float:
    """Return the mean number of proposed slots that a rule keeps per counted token and layer.

    The rule is bound without checks: a search also tries levels that `bind_rule` rejects.

    Raises:
        CalibrationError: the calibration lacks a reference that the rule needs.
    """
    kept = []
    for layer, candidates in enumerate(proposals.layers):
        device = candidates.router_logits_TE.device
        select = rule.bind(_context(rule, layer, routers, calibration, device))
        counted_T = proposals.counted_T.to(device)
        kept.append(select(candidates)[counted_T].sum().to(proposals.counted_T.device))
    units = len(kept) * int(proposals.counted_T.sum())
    return int(torch.stack(kept).sum()) / units


def _context(
    rule: Rule,
    layer: int,
    routers: Routers,
    calibration: Calibration | None,
    device: torch.device,
) -> LayerContext:
    null = rule.required_null
    table = contributions = None
    if null is not None and calibration is not None:
        if null in NEEDED.values():
            known = calibration.contributions
            contributions = None if known is None else known.to(torch.device("cpu"))
        else:
            table = calibration.table(null, layer).to(device)
    return LayerContext(
        layer=layer,
        num_experts=routers.num_experts,
        model_top_k=routers.model_top_k,
        device=device,
        table=table,
        contributions=contributions,
        num_layers=len(routers.sites),
    )


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
