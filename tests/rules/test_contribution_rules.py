"""Rules that drop slots by what they are expected to contribute. Axes: T tokens, K slots."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bh_routing.errors import CalibrationError, InputError
from bh_routing.multitest import benjamini_hochberg
from bh_routing.multitest.step_up import number_blocks, reject_in_blocks
from bh_routing.rules import (
    BenjaminiHochbergDrop,
    ContributionThreshold,
    LayerContext,
    OracleContribution,
    Rows,
    Rule,
)
from tests.rules.proposals import MODEL_TOP_K, context_for, propose, random_logits

SLOTS = propose(random_logits(400), shuffled=True)


def context_of(rule: Rule) -> LayerContext:
    return dataclasses.replace(context_for(rule), layer=1)


def kept(rule: Rule) -> Tensor:
    return rule.bind(context_of(rule))(SLOTS)


def scores(rule: BenjaminiHochbergDrop) -> Tensor:
    contributions = context_of(rule).contributions
    assert contributions is not None
    return SLOTS.top_k_weights_TK * contributions.scale(rule.statistic, 1)[SLOTS.top_k_index_TK]


def p_values(rule: BenjaminiHochbergDrop) -> Tensor:
    """The definition, by counting."""
    contributions = context_of(rule).contributions
    assert contributions is not None
    needed_N = contributions.needed(rule.statistic, "norm").sorted_scores_N
    not_above_TK = (needed_N <= scores(rule)[..., None]).sum(-1)
    return (1 + not_above_TK).double() / (len(needed_N) + 1)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.8])
def test_by_token_the_dropped_slots_are_those_bh_rejects_among_the_tokens_slots(
    alpha: float,
) -> None:
    rule = BenjaminiHochbergDrop(alpha)
    expected_TK = ~benjamini_hochberg(p_values(rule), alpha)
    expected_TK |= scores(rule) == scores(rule).amax(dim=-1, keepdim=True)
    assert 0 < int(expected_TK.sum()) < expected_TK.numel()
    assert torch.equal(kept(rule), expected_TK)


@pytest.mark.parametrize("block_tokens", [1, 7, 400, 1_000])
def test_by_block_bh_runs_over_all_slots_of_the_block(block_tokens: int) -> None:
    rule = BenjaminiHochbergDrop(0.3, scope="block", block_tokens=block_tokens)
    blocks = p_values(rule).split(block_tokens)
    rejected = [benjamini_hochberg(p.flatten(), 0.3).view(p.shape) for p in blocks]
    best_TK = scores(rule) == scores(rule).amax(dim=-1, keepdim=True)
    assert torch.equal(kept(rule), ~torch.cat(rejected) | best_TK)


def test_blocks_of_one_token_decide_as_the_token_does() -> None:
    assert torch.equal(
        kept(BenjaminiHochbergDrop(0.4, scope="block", block_tokens=1)),
        kept(BenjaminiHochbergDrop(0.4)),
    )


@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.9])
def test_over_the_population_the_cut_off_is_the_last_score_on_bhs_line(alpha: float) -> None:
    rule = BenjaminiHochbergDrop(alpha, scope="population")
    contributions = context_of(rule).contributions
    assert contributions is not None
    all_N = contributions.all_of(rule.statistic).sorted_scores_N
    needed_N = contributions.needed(rule.statistic, "norm").sorted_scores_N
    p_N = torch.tensor(
        [(1 + int((needed_N <= s).sum())) / (len(needed_N) + 1) for s in all_N[::10]],
        dtype=torch.float64,
    )
    cut_off = rule.cut_off(context_of(rule))
    on_line_N = p_N <= alpha * torch.arange(1, len(all_N) + 1)[::10] / len(all_N)
    assert bool((all_N[::10][on_line_N] <= cut_off).all())
    assert not bool(on_line_N[all_N[::10] > cut_off].any())


def test_the_population_rule_is_a_fixed_threshold() -> None:
    rule = BenjaminiHochbergDrop(0.4, scope="population")
    fixed = ContributionThreshold(rule.cut_off(context_of(rule)))
    assert torch.equal(kept(rule), kept(fixed))
    assert 1.5 < float(kept(rule).sum(-1).double().mean()) < 7.5


@pytest.mark.parametrize("scope", ["token", "block", "population"])
def test_a_larger_alpha_drops_more_down_to_min_k(scope: str) -> None:
    means = [
        float(kept(BenjaminiHochbergDrop(a, scope=scope, min_k=2)).sum(-1).double().mean())  # type: ignore[arg-type]
        for a in (1e-9, 0.2, 0.5, 1 - 1e-9)
    ]
    assert means == sorted(means, reverse=True)
    assert means[0] == MODEL_TOP_K
    assert means[-1] < 2.5
    assert int(kept(BenjaminiHochbergDrop(0.99, min_k=2)).sum(-1).min()) == 2


def test_the_statistic_is_the_sensitivity_unless_another_is_named() -> None:
    assert BenjaminiHochbergDrop(0.2).required_null == "needed_by_loss"
    assert BenjaminiHochbergDrop(0.2, statistic="contribution").required_null == "needed"
    assert ContributionThreshold(0.1).required_null == "needed_by_loss"
    assert OracleContribution(0.1).required_null == "needed"


def test_the_oracle_drops_by_the_true_norm_over_the_layers_residual() -> None:
    assert SLOTS.output_norms_TK is not None
    truth_TK = SLOTS.top_k_weights_TK * SLOTS.output_norms_TK / 2.0  # the residual of layer 1
    expected_TK = (truth_TK > 0.02) | (truth_TK == truth_TK.amax(dim=-1, keepdim=True))
    assert torch.equal(kept(OracleContribution(0.02)), expected_TK)


@pytest.mark.parametrize(
    "rule", [BenjaminiHochbergDrop(0.2), ContributionThreshold(0.1), OracleContribution(0.1)]
)
def test_without_a_calibration_the_remedy_is_named(rule: Rule) -> None:
    context = dataclasses.replace(context_for(rule), contributions=None)
    with pytest.raises(CalibrationError, match=r"'needed_by_loss'\]\), or use statistic: contr"):
        rule.bind(context)


@pytest.mark.parametrize(
    "fields",
    [{"alpha": 1.0}, {"scope": "layer"}, {"needed": "size"}, {"statistic": "norm"}, {"min_k": 0}],
)
def test_a_value_out_of_range_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InputError):
        BenjaminiHochbergDrop(**({"alpha": 0.1} | fields))  # type: ignore[arg-type]


def test_padding_is_no_hypothesis() -> None:
    p_TK = torch.tensor(
        [[0.001, 0.001], [0.04, 0.9], [0.05, 0.9], [0.09, 0.2]], dtype=torch.float64
    )
    block_T = number_blocks(torch.tensor([-1, 0, 0, 0]), torch.tensor([0, 0, 1, 2]), 2)
    # Alone in its block the last row has two hypotheses: 0.09 * 2 / 1 <= 0.2. In one block with
    # the padding, 0.04 would have been rejected at 0.09: 0.04 * 4 / 3 <= 0.09.
    assert reject_in_blocks(p_TK, 0.2, block_T).tolist()[3] == [True, True]
    assert reject_in_blocks(p_TK, 0.09, block_T).tolist()[1:3] == [[False, False]] * 2


def test_blocks_end_with_their_sequence_and_start_again_behind_a_hole() -> None:
    is_real_BS = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()
    is_start_BS = torch.zeros_like(is_real_BS)
    is_start_BS[1, 2] = True  # two sequences packed into one row
    rows = Rows.of_batch(is_real_BS, is_start_BS)
    assert rows.sequence_T.tolist() == [-1, 0, 0, -1, 0, 0, 1, 1, 2, 2, -1, -1]
    assert rows.position_T.tolist() == [0, 0, 1, 0, 2, 3, 0, 1, 0, 1, 0, 0]
    block_T = number_blocks(rows.sequence_T, rows.position_T, 3)
    assert block_T.tolist() == [
        0,
        1,
        1,
        3,
        1,
        5,
        6,
        6,
        8,
        8,
        10,
        11,
    ]
