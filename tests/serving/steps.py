"""Compare recorded decisions of a server with a rule applied to each step on its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.base import LayerContext, Rule
from bh_routing.rules.plan import Candidates, Rows


class Call(NamedTuple):
    """One layer of one forward pass: the model's own routing, the served one, and the steps."""

    layer: int
    logits_TE: Tensor
    own_weights_TK: Tensor
    own_index_TK: Tensor
    weights_TK: Tensor
    index_TK: Tensor
    step_T: Tensor


def check_calls(calls: Iterable[Call], rule: Rule, calibration: Calibration) -> tuple[int, int]:
    """Check every decision, and return the numbers of prefill and decode rows."""
    prefill = decode = 0
    for call in calls:
        context = LayerContext(
            layer=call.layer, num_experts=64, model_top_k=8, device=torch.device("cpu"),
            contributions=calibration.contributions, num_layers=6,
        )  # fmt: skip
        is_decode_T = call.step_T >= 0
        assert torch.equal(call.own_weights_TK[~is_decode_T], call.weights_TK[~is_decode_T])
        assert torch.equal(call.own_index_TK[~is_decode_T], call.index_TK[~is_decode_T])
        prefill += int((~is_decode_T).sum())
        decode += int(is_decode_T.sum())
        if not is_decode_T.any():
            continue
        own_TK, index_TK = call.own_weights_TK[is_decode_T], call.own_index_TK[is_decode_T].long()
        rows = Rows.of_step(len(own_TK), own_TK.device)
        keep_TK = rule.bind(context)(
            Candidates(call.logits_TE[is_decode_T], index_TK, own_TK, rows=rows)
        )
        assert torch.equal(call.weights_TK[is_decode_T], own_TK.masked_fill(~keep_TK, 0.0))
        # Best of the kept slots: a step need not read a token's expert of the largest weight.
        best_slot_T1 = own_TK.masked_fill(~keep_TK, -1.0).argmax(-1, keepdim=True)
        best_T1 = index_TK.gather(-1, best_slot_T1)
        wanted_TK = torch.where(keep_TK, index_TK, best_T1)
        assert torch.equal(call.index_TK[is_decode_T].long(), wanted_TK)
    return prefill, decode
