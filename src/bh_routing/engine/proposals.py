"""What the untouched model's routers propose on text, kept so that rules can be tried on it.

A rule's mean number of experts can be had from here without another forward pass. Under the rule
itself hidden states drift, and the mean with them: a few per cent, which a measurement corrects.

Axes: T tokens, E experts, K candidate slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from bh_routing.engine.windows import TokenizedDocument, cut_windows, prefix_token
from bh_routing.models.discovery import Routers, find_routers
from bh_routing.models.listen import evaluating
from bh_routing.models.routing import route
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.contributions import NEEDED
from bh_routing.rules.base import Candidates, LayerContext, Rows, Rule, Selector, Unit
from bh_routing.rules.mixing import MixingRule

MEMORY_BYTES: Final = 2**30
"""Most that the proposals of a text may take."""
_SLOT_BYTES: Final = 16  # index, weight and norm
_ROW_BYTES: Final = 16  # sequence and position


@dataclass(frozen=True, slots=True)
class Proposals:
    """The candidates of every layer for the same tokens, each on its layer's device."""

    layers: tuple[Candidates, ...]
    counted_T: Tensor
    """Bool: False for tokens that are only context."""


@dataclass(frozen=True, eq=False)
class _Recorder(MixingRule):
    """Keep everything, and remember what was proposed."""

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
    """Return how many tokens' proposals fit into MEMORY_BYTES."""
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
    """Run the untouched model over documents and keep what its routers propose.

    Args:
        model: a transformers model with routers, not inside `route`.
        tokenizer: its tokenizer, for the prefix token.
        documents: text, of no more tokens than `tokens_that_fit` says.
        window: most input tokens of a forward pass.
        num_candidates: slots that the routers are to propose, at least the model's own k.
        with_norms: run every candidate expert and keep the norm of its output.
    Raises:
        InputError: the tokenizer has no token to put in front of a document.
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
        # A call is one window: the rows of a sequence of its own.
        rows=Rows(
            torch.cat([torch.full_like(r.sequence_T, call) for call, r in enumerate(rows)]),
            torch.cat([r.position_T for r in rows]),
        ),
    )
    calls.clear()  # one layer at a time is there twice
    return joined


@torch.inference_mode()
def mean_experts(
    rule: Rule, proposals: Proposals, routers: Routers, calibration: Calibration | None = None
) -> float:
    """Return how many of the proposed slots a rule keeps, on average over counted tokens.

    The rule is bound as it is: a search asks on its way for levels that `bind_rule` refuses.

    Raises:
        CalibrationError: the rule needs a reference that the calibration doesn't hold.
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
