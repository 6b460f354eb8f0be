"""A rule in one layer of a served model, applied to the routing that vLLM proposes.

Axes: T rows of a forward pass, D decode rows, E experts, K slots, C candidates. Shapes depend on T
alone and nothing is read back to the host, so the operations can be compiled and captured in a CUDA
graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bh_routing.kernels.router import fused_router, served_step_router
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.plan import Candidates, Rows, Selector, keep_best
from bh_routing.rules.router import SoftmaxFamily, Weighing

MOST_FUSED_ROWS: Final = 64
"""A forward pass of more rows is decided by torch operations, under a rule by decode step."""
Decided = tuple[Tensor, Tensor]
"""Weights and expert ids of T rows, both (T, K)."""


class StepRows:
    """Which rows of the forward pass decode together, in buffers that a CUDA graph can read.

    Args:
        max_rows: most rows of a forward pass.
        max_decodes: most decode rows of a forward pass.
        device: device of the buffers.
    """

    def __init__(self, max_rows: int, max_decodes: int, device: torch.device) -> None:
        self.max_decodes = max_decodes
        self._zeros_T = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._rows = torch.stack([self._zeros_T - 1, self._zeros_T - 1, self._zeros_T])

    def set(self, is_decode_T: NDArray[np.bool_]) -> None:
        """Set the rows of the next forward pass; further rows are padding. No host sync."""
        count, size = len(is_decode_T), self._rows.shape[1]
        values = np.full((3, size), [[-1], [-1], [0]], dtype=np.int64)
        values[0, :count] = np.where(is_decode_T, 0, -1)
        values[1, :count] = np.arange(count)
        values[2, :count] = np.where(is_decode_T, 1, 2)
        host = torch.from_numpy(values)
        if self._rows.is_cuda:
            # The caching host allocator keeps pinned memory until the copy is done.
            host = host.pin_memory()
        self._rows.copy_(host, non_blocking=True)

    def of(self, num_rows: int) -> Rows:
        """Return the rows of the running forward pass."""
        step_T, sequence_T, _ = self._rows[:, :num_rows]
        return Rows(sequence_T, self._zeros_T[:num_rows], step_T)

    def kinds(self, num_rows: int) -> Tensor:
        """Return each row's kind, int64: 1 if it decodes, 2 if it is a prompt's, 0 if padding."""
        return self._rows[2, :num_rows]


class ServedLayer:
    """A rule bound to one layer.

    Args:
        rule: decides which slots stay.
        context: the layer.
        select_prefill: decides for prefill rows, if the rule decides by step; None: all slots stay.
        normalises: whether the model's weights are divided by their sum.
        rows: the rows of the running forward pass.
        record_TK: int32, filled with each forward pass's expert ids.
    Raises:
        InputError, CalibrationError: a rule doesn't fit the layer.
    """

    def __init__(
        self,
        rule: Rule,
        context: LayerContext,
        select_prefill: Selector | None,
        *,
        normalises: bool,
        rows: StepRows,
        record_TK: Tensor,
    ) -> None:
        self._by_step = rule.unit == "step"
        self._num_candidates = rule.num_candidates(context.model_top_k)
        self._select = rule.bind(context)
        self._select_prefill = select_prefill
        self._weighing = Weighing.of(rule, normalises=normalises, model_top_k=context.model_top_k)
        self._rows = rows
        self._record_TK = record_TK
        self._family = SoftmaxFamily(normalises=normalises, weights_dtype=torch.float32)
        self._fused = None if self._by_step else fused_router(rule, context, self._family)
        self._fused_step = None
        if self._by_step and select_prefill is None:
            self._fused_step = served_step_router(rule, context, self._family)

    @property
    def implementation(self) -> str:
        """How decode rows are decided."""
        is_torch = self._fused is None and self._fused_step is None
        return "torch" if is_torch else "fused kernels"

    def route(self, router_logits_TE: Tensor) -> Decided | None:
        """Route by kernels, from the logits alone; None if there are none for this forward pass."""
        if self._fused is not None:
            slots = self._fused(router_logits_TE)
            return slots.top_k_weights_TK, self._recorded(slots.top_k_index_TK)
        # Checked first: compiled code may not depend on the number of rows.
        if self._fused_step is None or len(router_logits_TE) > MOST_FUSED_ROWS:
            return None
        num_rows = len(router_logits_TE)
        index_TK = self._record_TK[:num_rows]
        if len(index_TK) < num_rows:
            index_TK = index_TK.new_empty(num_rows, index_TK.shape[1])
        return self._fused_step(router_logits_TE, self._rows.kinds(num_rows), index_TK), index_TK

    def decide(self, router_logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor) -> Decided:
        """Apply the rule to the model's own routing; new tensors of the same dtypes."""
        candidates = Candidates(router_logits_TE.float(), index_TK.long(), weights_TK)
        if not self._by_step:
            alias_TK, kept_TK, _ = self._weighing.route(candidates, self._select(candidates))
            return kept_TK, self._recorded(alias_TK).to(index_TK.dtype, copy=True)
        num_rows, num_slots = index_TK.shape
        if self._num_candidates > num_slots:
            candidates = self._family.propose(router_logits_TE, self._num_candidates)
        keep_TC = self._keep_by_step(self._family.as_compared(candidates, num_slots), num_slots)
        slots = self._weighing.route(candidates, keep_TC)
        kept_TK, alias_TK = self._own_places(*slots, num_slots)
        # Padding takes an expert that is read anyway.
        is_padding_T1 = self._rows.of(num_rows).sequence_T[:, None] < 0
        alias_TK = torch.where(is_padding_T1, alias_TK[:1, :1], alias_TK)
        return kept_TK, self._recorded(alias_TK).to(index_TK.dtype, copy=True)

    def _own_places(
        self, alias_TC: Tensor, kept_TC: Tensor, keep_TC: Tensor, num_slots: int
    ) -> Decided:
        """Return weights and ids in as many places as the model's own slots.

        Refilled slots take the places of dropped ones: no token keeps more than its own k.
        """
        if self._num_candidates == num_slots:
            return kept_TC, alias_TC
        place_TK = (~keep_TC).byte().argsort(dim=-1, stable=True)[:, :num_slots]
        return kept_TC.gather(-1, place_TK), alias_TC.gather(-1, place_TK)

    def _keep_by_step(self, candidates: Candidates, model_top_k: int) -> Tensor:
        index_TC = candidates.top_k_index_TK
        num_rows, most = len(index_TC), self._rows.max_decodes
        rows = self._rows.of(num_rows)
        # A sequence whose logits are NaN doesn't vote.
        is_finite_T = candidates.router_logits_TE.sum(-1).isfinite()
        rows = rows._replace(step_T=torch.where(is_finite_T, rows.step_T, -1))
        if num_rows <= most:
            keep_TC = self._select(candidates._replace(rows=rows))
        else:
            # A rule provides for as many steps as rows: all but the decode rows are left out.
            first_D = rows.step_T.argsort(descending=True, stable=True)[:most]
            sorted_TE = candidates.sorted_logits_TE
            part = Candidates(
                candidates.router_logits_TE[first_D],
                index_TC[first_D],
                candidates.top_k_weights_TK[first_D],
                rows=Rows(*(field_T[first_D] for field_T in rows)),
                sorted_logits_TE=None if sorted_TE is None else sorted_TE[first_D],
            )
            keep_TC = keep_best(candidates, model_top_k)
            keep_TC = keep_TC.index_copy(0, first_D, self._select(part))
        if self._select_prefill is None:
            return keep_TC
        own = candidates._replace(
            top_k_index_TK=index_TC[:, :model_top_k],
            top_k_weights_TK=candidates.top_k_weights_TK[:, :model_top_k],
        )
        keep_TK = self._select_prefill(own)
        prefill_TC = torch.nn.functional.pad(keep_TK, (0, index_TC.shape[-1] - model_top_k))
        return torch.where((rows.step_T >= 0)[:, None], keep_TC, prefill_TC)

    def _recorded(self, index_TK: Tensor) -> Tensor:
        """Return the ids as int32, in the record if it has room."""
        if len(index_TK) > len(self._record_TK):
            return index_TK.to(torch.int32)
        record_TK = self._record_TK[: len(index_TK)]
        record_TK.copy_(index_TK)
        return record_TK


_LAYERS: Final[dict[int, ServedLayer]] = {}


# An operation of its own: a compiled model calls it, and doesn't contain the rule's constants.
@torch.library.custom_op("bh_routing::decide", mutates_args=())
def _decide(
    router_logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, layer: int
) -> tuple[Tensor, Tensor]:
    return _LAYERS[layer].decide(router_logits_TE, weights_TK, index_TK)


@_decide.register_fake
def _(
    router_logits_TE: Tensor, weights_TK: Tensor, index_TK: Tensor, layer: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights_TK), torch.empty_like(index_TK)


def routing_of(
    own: Callable[..., Decided], number: int, layer: ServedLayer
) -> Callable[..., Decided]:
    """Return a replacement of a vLLM router's `_compute_routing`.

    Args:
        own: the router's method.
        number: number of the layer in this process.
        layer: the rule in this layer.
    """
    _LAYERS[number] = layer

    def decide(
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> Decided:
        routed = layer.route(router_logits)
        if routed is not None:
            return routed
        weights_TK, index_TK = own(hidden_states, router_logits, indices_type, input_ids=input_ids)
        decided: Decided = _decide(router_logits, weights_TK, index_TK, number)
        return decided

    return decide
