"""The static rule."""

from __future__ import annotations

import pytest
import torch

from bh_routing.errors import InputError
from bh_routing.rules import Candidates, TopK
from tests.rules.proposals import context_for, propose, random_logits

LOGITS_TE = random_logits(50)


@pytest.mark.parametrize("k", [1, 4, 8, 20])
def test_every_token_keeps_exactly_k(k: int) -> None:
    rule = TopK(k)
    candidates = propose(LOGITS_TE, rule.num_candidates(8), shuffled=True)
    assert rule.bind(context_for(rule))(candidates).sum(dim=-1).tolist() == [k] * 50


def test_a_tie_goes_to_the_slot_that_the_router_put_first() -> None:
    candidates = Candidates(
        router_logits_TE=torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
        top_k_index_TK=torch.tensor([[2, 0, 1]]),
        top_k_weights_TK=torch.tensor([[0.3, 0.3, 0.3]]),
    )
    rule = TopK(2)
    assert rule.bind(context_for(rule, 4, 3))(candidates).tolist() == [[True, True, False]]


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "8", None])
def test_a_k_that_is_no_count_is_refused(k: int) -> None:
    with pytest.raises(InputError, match="k must be a whole number of at least 1, got"):
        TopK(k)
