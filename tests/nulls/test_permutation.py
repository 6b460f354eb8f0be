"""The permutation null, and the studentized background. Axes: T tokens, E experts, H hidden."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.multitest import benjamini_hochberg
from bh_routing.nulls import RouterPass, get_null
from bh_routing.nulls.centred import NUM_PERMUTATIONS
from bh_routing.rules import BenjaminiHochberg, noise_control

ALPHAS = (0.01, 0.05, 0.10)


def aligned_router() -> RouterPass:
    """Tokens that each point along the gate of one expert."""
    generator = torch.Generator().manual_seed(0)
    gate_EH = torch.randn(16, 64, generator=generator)
    hidden_TH = gate_EH.repeat(50, 1) + 0.5 * torch.randn(800, 64, generator=generator)
    logits_TE = hidden_TH @ gate_EH.T / 8
    return RouterPass(logits_TE, logits_TE.topk(2).indices, hidden_TH, gate_EH / 8)


def test_permuting_destroys_the_alignment_and_keeps_the_number_of_scores() -> None:
    null, seen = get_null("permutation"), aligned_router()
    reference = null.reference_of(seen)
    assert reference.shape == (NUM_PERMUTATIONS * 800 * 16,)
    largest = null.score(seen.router_logits_TE).amax(dim=-1)
    assert float((reference < largest.median()).double().mean()) > 0.99


def test_permuting_is_the_same_each_time() -> None:
    null, seen = get_null("permutation"), aligned_router()
    assert torch.equal(null.reference_of(seen), null.reference_of(seen))


def test_a_router_without_a_gate_is_refused() -> None:
    seen = aligned_router()._replace(gate_EH=None)
    with pytest.raises(CalibrationError, match="null 'permutation' needs a router"):
        get_null("permutation").reference_of(seen)


@pytest.mark.parametrize("bias_std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_with_a_bias_alpha_bounds_the_tokens_with_any_rejection_where_nothing_is_aligned(
    bias_std: float, alpha: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_EH = torch.randn(32, 64, generator=generator) / 8
    bias_E = bias_std * torch.randn(32, generator=generator)

    def seen() -> RouterPass:
        hidden_TH = torch.randn(8_000, 64, generator=generator)
        logits_TE = hidden_TH @ gate_EH.T + bias_E
        return RouterPass(logits_TE, logits_TE.topk(4).indices, hidden_TH, gate_EH, bias_E)

    null = get_null("permutation")
    table = null.table_of(seen())
    p_TE = null.p_from_score(null.score(seen().router_logits_TE), table)
    share = float(benjamini_hochberg(p_TE, alpha).any(-1).double().mean())
    # 8,000 tokens: the standard error is below 0.0034.
    assert share <= alpha + 0.01


@pytest.mark.parametrize(
    "bend",
    [lambda x: 3 * (x / 3).tanh(), lambda x: 1.5 * x, torch.sigmoid, lambda x: x + x.roll(1)],
)
def test_a_router_that_does_more_than_a_weight_and_a_bias_is_rejected(
    bend: Callable[[Tensor], Tensor],
) -> None:
    seen = aligned_router()
    seen = seen._replace(router_logits_TE=bend(seen.router_logits_TE))
    with pytest.raises(CalibrationError, match="this router does more"):
        get_null("permutation").reference_of(seen)


def test_on_noise_the_permutation_null_keeps_its_alpha() -> None:
    # 10,000 tokens: the table's own draw moves the share by a few tenths of alpha.
    rules = [BenjaminiHochberg(alpha, null="permutation") for alpha in ALPHAS]
    for result in noise_control(rules, num_experts=64, model_top_k=8):
        assert result.share_any_low <= 1.3 * result.alpha


def test_on_noise_the_studentized_background_rejects_too_so_its_alpha_is_a_knob() -> None:
    rule = BenjaminiHochberg(0.05, null="background_studentized")
    (result,) = noise_control([rule], num_experts=64, model_top_k=8)
    assert result.share_any_low > 0.5
    assert get_null("background_studentized").alpha_is == "tuning parameter"


def test_studentizing_makes_a_score_blind_to_the_rows_scale() -> None:
    logits_TE = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    null = get_null("background_studentized")
    assert torch.allclose(null.score(4 * logits_TE), null.score(logits_TE), atol=1e-5)
