"""The null of a gate that isn't aligned with the token: its coordinates are shuffled.

Axes: T tokens, E experts, K slots, H hidden.
"""

from __future__ import annotations

from typing import ClassVar, Final

import torch
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.nulls.base import AlphaMeaning, RouterPass
from bh_routing.nulls.centred import TabledNull

NUM_PERMUTATIONS: Final = 4
LARGEST_DIFFERENCE: Final = 0.02
"""Of the logits' spread over a token's experts: bfloat16 rounds by less."""


class Permutation(TabledNull):
    """Reference: logits of the same hidden states under gates whose coordinates are permuted.

    All experts' rows are permuted alike, so norms and angles between experts stay and only the
    alignment with the hidden state is destroyed. A router's bias is added to both.
    """

    name: ClassVar[str] = "permutation"
    alpha_is: ClassVar[AlphaMeaning] = "error rate"
    meaning: ClassVar[str] = (
        'the false discovery rate that BH aims at for "the gate isn\'t aligned with this token"'
    )
    needs_gate: ClassVar[bool] = True

    def reference_of(self, seen: RouterPass) -> Tensor:
        """Return the scores under each permuted gate, shape (NUM_PERMUTATIONS * T * E,).

        Raises:
            CalibrationError: the router's input or weight is unknown, or its logits aren't the
                input times the weight plus the bias, up to rounding and a constant per token.
        """
        hidden_TH, gate_EH = seen.hidden_states_TH, seen.gate_EH
        if hidden_TH is None or gate_EH is None or hidden_TH.shape[-1] != gate_EH.shape[-1]:
            raise CalibrationError(
                "null 'permutation' needs a router that multiplies its input by a weight, which "
                "this model's doesn't show; choose null='gaussian'"
            )
        hidden_TH, gate_EH = hidden_TH.float(), gate_EH.float()
        bias_E = 0.0 if seen.bias_E is None else seen.bias_E.float()
        logits_TE = seen.router_logits_TE.float()
        difference_TE = hidden_TH @ gate_EH.T + bias_E - logits_TE
        if not _spread(difference_TE) <= LARGEST_DIFFERENCE * _spread(logits_TE):
            raise CalibrationError(
                "null 'permutation' needs logits that are the router's input times its weight plus "
                "its bias, and this router does more (a cap, a scale, a norm or noise); choose "
                "null='gaussian'"
            )
        scores = []
        for seed in range(NUM_PERMUTATIONS):
            generator = torch.Generator().manual_seed(seed)
            order_H = torch.randperm(gate_EH.shape[-1], generator=generator)
            logits_TE = hidden_TH @ gate_EH[:, order_H.to(gate_EH.device)].T + bias_E
            scores.append(self.score(logits_TE).flatten())
        return torch.cat(scores)


def _spread(values_TE: Tensor) -> Tensor:
    """Return the norm of what is left of each token's values without their mean."""
    spread: Tensor = (values_TE - values_TE.mean(dim=-1, keepdim=True)).norm()
    return spread
