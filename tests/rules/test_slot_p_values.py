"""The p-values that reports show are those that the rule decided by."""

from __future__ import annotations

import pytest
import torch

from bh_routing.rules import BenjaminiHochberg, BenjaminiHochbergDrop, Rule, TopK
from tests.rules.proposals import MODEL_TOP_K, context_for, propose, random_logits

LOGITS_TE = random_logits(200)


@pytest.mark.parametrize(
    ("rule", "kept_are_small"),
    [
        (BenjaminiHochberg(0.1), True),
        (BenjaminiHochberg(0.1, null="gaussian"), True),
        (BenjaminiHochbergDrop(0.3), False),
    ],
    ids=["bh", "bh gaussian", "bh_drop"],
)
def test_what_is_kept_lies_on_one_side(rule: Rule, kept_are_small: bool) -> None:
    context = context_for(rule)
    candidates = propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K))
    p_values = rule.slot_p_values(context)
    assert p_values is not None
    p_TK, keep_TK = p_values(candidates), rule.bind(context)(candidates)
    assert p_TK.dtype == torch.float64
    assert 0 < keep_TK.sum() < keep_TK.numel()
    small, large = (keep_TK, ~keep_TK) if kept_are_small else (~keep_TK, keep_TK)
    most_T = p_TK.masked_fill(~small, 0.0).amax(-1)
    least_T = p_TK.masked_fill(~large, 1.0).amin(-1)
    assert bool((most_T <= least_T).all())


def test_a_rule_without_p_values_says_so() -> None:
    assert TopK(4).slot_p_values(context_for(TopK(4))) is None
