"""Null distributions of router scores: centred logits, permuted gates, and probabilities."""

from __future__ import annotations

from math import pi, sqrt
from typing import ClassVar, Final

import torch
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.nulls.base import AlphaMeaning, Null, ReferenceTable, RouterPass

# 1 / Phi^-1(3/4): makes the median absolute deviation estimate a Gaussian's standard deviation.
MAD_TO_SIGMA: Final = 1.4826
# The same for the mean absolute deviation.
MEAN_DEVIATION_TO_SIGMA: Final = sqrt(pi / 2)


def median_of_sorted(sorted_TE: Tensor) -> Tensor:
    """Return the median of rows sorted in either direction, shape (T, 1).

    With an even number of experts it is the mean of the two middle values: `torch.median` returns
    the lower one, which would shift every score upwards.
    """
    num_experts = sorted_TE.shape[-1]
    upper = num_experts // 2
    lower = (num_experts - 1) // 2
    if lower == upper:
        return sorted_TE[..., upper : upper + 1]
    return sorted_TE[..., lower : upper + 1].mean(dim=-1, keepdim=True)


def _sort_rows(router_logits_TE: Tensor) -> Tensor:
    # float32: bf16 logits tie in groups, and their median would be rounded to one of them.
    return router_logits_TE.to(torch.float32).sort(dim=-1, descending=True).values


class CentredNull(Null):
    """A null whose score is logit - median of the token's logits, on a robust scale if studentized.

    The temperature cancels.
    """

    is_studentized: ClassVar[bool] = False

    def score(self, router_logits_TE: Tensor, temperature: float = 1.0) -> Tensor:
        """Score each expert against its token's median."""
        return self._scores(router_logits_TE.to(torch.float32), _sort_rows(router_logits_TE))

    def descending_scores(
        self,
        router_logits_TE: Tensor,
        temperature: float = 1.0,
        sorted_logits_TE: Tensor | None = None,
    ) -> Tensor:
        """Return the scores of each row, largest first, from one sort of the logits."""
        sorted_TE = _sort_rows(router_logits_TE) if sorted_logits_TE is None else sorted_logits_TE
        return self._scores(sorted_TE, sorted_TE)

    def _scores(self, logits_TE: Tensor, sorted_TE: Tensor) -> Tensor:
        if self.is_studentized:
            return studentize(logits_TE, sorted_TE)
        return logits_TE - median_of_sorted(sorted_TE)


def studentize(logits_TE: Tensor, sorted_TE: Tensor) -> Tensor:
    """Return (logit - median) / a robust scale of the token's logits."""
    median_T1 = median_of_sorted(sorted_TE)
    sorted_deviations_TE = (sorted_TE - median_T1).abs().sort(dim=-1).values
    mad_T1 = median_of_sorted(sorted_deviations_TE)
    scale_T1 = torch.where(
        mad_T1 > 0,
        mad_T1 * MAD_TO_SIGMA,
        sorted_deviations_TE.mean(dim=-1, keepdim=True) * MEAN_DEVIATION_TO_SIGMA,
    )
    # The smallest float32 instead of 0: if all logits are equal the scores are 0 / tiny.
    return (logits_TE - median_T1) / scale_T1.clamp_min(torch.finfo(torch.float32).tiny)


class Gaussian(CentredNull):
    """Robust z-scores compared with N(0, 1); needs no calibration.

    If more than half of a token's logits are equal, their MAD is 0 and the mean absolute deviation
    gives the scale instead. If all are equal, every score is 0.

    Source: Iglewicz & Hoaglin (1993), "How to Detect and Handle Outliers", for both scales.
    """

    name: ClassVar[str] = "gaussian"
    alpha_is: ClassVar[AlphaMeaning] = "error rate"
    meaning: ClassVar[str] = (
        "the false discovery rate that BH aims at if a token's background logits are Gaussian; "
        "centre and scale are estimated from the same few logits, so noise alone exceeds it"
    )
    needs_table: ClassVar[bool] = False
    is_studentized: ClassVar[bool] = True

    def p_from_score(self, scores: Tensor, table: ReferenceTable | None = None) -> Tensor:
        """Return the upper tail of N(0, 1) at each score; a table is ignored."""
        # erfc, not 1 - cdf: BH's critical values lie far in the tail.
        tail: Tensor = torch.special.erfc(scores.to(torch.float64) * sqrt(0.5))
        return 0.5 * tail


class TabledNull(CentredNull):
    """logit - median, compared with a table of such scores from calibration text."""

    needs_table: ClassVar[bool] = True

    def p_from_score(self, scores: Tensor, table: ReferenceTable | None = None) -> Tensor:
        """Return (1 + #{reference >= s}) / (N + 1)."""
        return self.require_table(table).p_values(scores)


class Pooled(TabledNull):
    """Reference: all logits of the layer, signals included. A negative control."""

    name: ClassVar[str] = "pooled"
    alpha_is: ClassVar[AlphaMeaning] = "nothing"
    meaning: ClassVar[str] = (
        "nothing: the reference holds the signals too, so that hardly anything stands out of it; "
        "a negative control"
    )

    def reference(self, router_logits_TE: Tensor, top_k_index_TK: Tensor) -> Tensor:
        """Return the scores of all experts, shape (T * E,)."""
        return self.score(router_logits_TE).flatten()


class Background(TabledNull):
    """Reference: the experts outside the model's own top-k."""

    name: ClassVar[str] = "background"
    alpha_is: ClassVar[AlphaMeaning] = "tuning parameter"
    meaning: ClassVar[str] = (
        "a tuning parameter, not an error rate: the reference was truncated by the very selection "
        "under test, so pure noise is rejected too"
    )

    def reference(self, router_logits_TE: Tensor, top_k_index_TK: Tensor) -> Tensor:
        """Return the scores outside the top-k, shape (T * (E - k),).

        Raises:
            CalibrationError: the model uses all of its experts, so none is background.
        """
        return self.score(router_logits_TE)[self._is_outside(router_logits_TE, top_k_index_TK)]

    def _is_outside(self, router_logits_TE: Tensor, top_k_index_TK: Tensor) -> Tensor:
        num_experts = router_logits_TE.shape[-1]
        if top_k_index_TK.shape[-1] >= num_experts:
            raise CalibrationError(
                f"null {self.name!r} needs experts outside the model's top-k; this one uses all "
                f"{num_experts}; choose null='gaussian'"
            )
        is_outside_TE = torch.ones_like(router_logits_TE, dtype=torch.bool)
        return is_outside_TE.scatter_(-1, top_k_index_TK, False)


class BackgroundStudentized(Background):
    """Background scores over a robust scale per token: comparable for flat and sharp routers."""

    name: ClassVar[str] = "background_studentized"
    is_studentized: ClassVar[bool] = True


class PerExpert(Background):
    """Reference: the same expert on tokens for which it was outside the model's own top-k.

    An expert with high logits for most tokens needs an even higher one to be selected, so the
    order of p-values may differ from that of the logits.
    """

    name: ClassVar[str] = "per_expert"
    by_expert: ClassVar[bool] = True

    def reference(self, router_logits_TE: Tensor, top_k_index_TK: Tensor) -> Tensor:
        """Return the scores, shape (T, E), NaN inside the top-k.

        Raises:
            CalibrationError: the model uses all of its experts, so none is background.
        """
        is_outside_TE = self._is_outside(router_logits_TE, top_k_index_TK)
        return self.score(router_logits_TE).masked_fill(~is_outside_TE, torch.nan)


NUM_PERMUTATIONS: Final = 4
LARGEST_DIFFERENCE: Final = 0.02
"""As a fraction of the logits' spread over a token's experts; bfloat16 rounds by less."""


class Permutation(TabledNull):
    """Reference: logits of the same hidden states under gates whose coordinates are permuted.

    All experts' rows get the same permutation, which preserves norms and angles between experts
    and destroys only the alignment with the hidden state. A router's bias is added to both. The
    permutations' seeds are 0 to NUM_PERMUTATIONS - 1, independent of the calibration's.
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
    """Return the norm of the values after subtracting each token's mean."""
    spread: Tensor = (values_TE - values_TE.mean(dim=-1, keepdim=True)).norm()
    return spread


class Softmax(Null):
    """p = 1 - softmax(logit / T), without a reference distribution.

    The probabilities of a token sum to 1, so its p-values sum to E - 1. For alpha < 1 - 1/E, at
    most one of them can be on or below BH's line, and only if the largest probability is at least
    1 - alpha / E. Usually nothing is rejected, and min_k decides.
    """

    name: ClassVar[str] = "softmax"
    alpha_is: ClassVar[AlphaMeaning] = "nothing"
    meaning: ClassVar[str] = (
        "nothing: 1 - probability is no p-value, and at most one expert can be rejected at any "
        "usual alpha; a negative control"
    )
    needs_table: ClassVar[bool] = False

    def score(self, router_logits_TE: Tensor, temperature: float = 1.0) -> Tensor:
        """Return softmax(logit / T) in float32."""
        return (router_logits_TE.to(torch.float32) / temperature).softmax(dim=-1)

    def p_from_score(self, scores: Tensor, table: ReferenceTable | None = None) -> Tensor:
        """Return 1 - score, at least 0; a table is ignored."""
        return (1.0 - scores.to(torch.float64)).clamp(0.0, 1.0)
