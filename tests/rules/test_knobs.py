"""What the one knob of each simple rule does. Axes: T tokens, E experts, K slots."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch

from bh_routing.errors import InputError
from bh_routing.rules import (
    Candidates,
    Entropy,
    HigherCriticism,
    LayerContext,
    MinP,
    PerLayerTopK,
    RandomK,
    Rule,
    Threshold,
    TopP,
)
from tests.rules.proposals import MODEL_TOP_K, context_for, propose, random_logits

LOGITS_TE = random_logits(3_000)
HAND_MADE = Candidates(
    router_logits_TE=torch.tensor([[0.0, 4.0, 3.0, 2.0, 1.0]]),
    top_k_index_TK=torch.tensor([[3, 1, 4, 2]]),
    top_k_weights_TK=torch.tensor([[3.0, 8.0, 1.0, 4.0]]) / 16,
)


def counts(rule: Rule, layer: int = 0) -> torch.Tensor:
    context = context_for(rule)
    bound = rule.bind(
        LayerContext(
            layer=layer,
            num_experts=context.num_experts,
            model_top_k=context.model_top_k,
            device=context.device,
            table=context.table,
        )
    )
    return bound(propose(LOGITS_TE, rule.num_candidates(MODEL_TOP_K))).sum(-1)


def kept(rule: Rule) -> list[bool]:
    keep_TK: torch.Tensor = rule.bind(context_for(rule, num_experts=5, model_top_k=4))(HAND_MADE)
    answer: list[bool] = keep_TK[0].tolist()
    return answer


def test_top_p_keeps_the_fewest_slots_that_hold_the_share_of_the_candidates() -> None:
    assert kept(TopP(0.5)) == [False, True, False, False]  # 8 of 16 is reached exactly
    assert kept(TopP(0.51)) == [False, True, False, True]
    assert kept(TopP(0.76)) == [True, True, False, True]
    assert kept(TopP(1.0)) == [True, True, True, True]


def test_min_p_compares_with_the_largest_weight() -> None:
    assert kept(MinP(0.5)) == [False, True, False, True]
    assert kept(MinP(0.51)) == [False, True, False, False]


def test_threshold_compares_with_the_candidates_mass_and_never_drops_the_best() -> None:
    assert kept(Threshold(3 / 16)) == [True, True, False, True]
    assert kept(Threshold(0.25)) == [False, True, False, True]
    assert kept(Threshold(0.9)) == [False, True, False, False]


@pytest.mark.parametrize(("scale", "expected"), [(0.5, 4), (0.49, 4), (0.375, 3), (0.01, 1)])
def test_entropy_counts_a_flat_router_as_that_many_equal_experts(
    scale: float, expected: int
) -> None:
    logits_TE = torch.zeros(1, 8)
    slots = propose(logits_TE, 4)
    rule = Entropy(scale)
    keep_TK = rule.bind(context_for(rule, num_experts=8, model_top_k=4))(slots)
    # exp(log 8) may be a hair above 8, so a product on a whole number is left out of the table.
    assert int(keep_TK.sum()) in {expected, math.ceil(scale * 8 + 1e-9)} & {expected, 4}


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (TopP, [0.2, 0.5, 0.8, 0.95]),
        (lambda v: MinP(1 - v), [0.1, 0.5, 0.9, 0.99]),
        (lambda v: Threshold(1 - v), [0.1, 0.7, 0.9, 0.99]),
        (Entropy, [0.05, 0.1, 0.2, 0.4]),
        (lambda v: HigherCriticism(-v), [-8.0, -4.0, -2.0, 0.0]),
        (RandomK.at_mean, [1.5, 2.0, 3.3, 7.5]),
    ],
)
def test_the_knob_moves_the_mean_one_way(
    make: Callable[[float], Rule], values: list[float]
) -> None:
    means = [float(counts(make(value)).double().mean()) for value in values]
    assert means == sorted(means)
    assert means[0] < means[-1]


def test_random_k_draws_the_histogram_it_was_given() -> None:
    # 3000 draws, seed 0: four standard deviations of a share of 0.5 are 0.037.
    shares = torch.bincount(counts(RandomK((1, 0, 2, 1))), minlength=5) / 3_000
    assert torch.allclose(shares, torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25]), atol=0.037)


def test_random_k_draws_anew_in_each_layer_and_for_each_seed() -> None:
    first = counts(RandomK((1, 1)))
    for other in (counts(RandomK((1, 1)), layer=1), counts(RandomK((1, 1), seed=1))):
        # Half of the tokens should agree; four standard deviations are 0.037.
        assert abs(float((first == other).double().mean()) - 0.5) < 0.037


def test_per_layer_top_k_takes_each_layers_own_k() -> None:
    rule = PerLayerTopK((3, 7))
    assert counts(rule).unique().tolist() == [3]
    assert counts(rule, layer=1).unique().tolist() == [7]


def test_per_layer_top_k_refuses_a_model_with_other_layers() -> None:
    with pytest.raises(InputError, match="k has 2 entries, the model has 3 layers"):
        counts(PerLayerTopK((3, 7)), layer=2)


def test_a_mean_is_shared_out_in_the_order_of_the_layers() -> None:
    assert PerLayerTopK.at_mean(3.4, layer_order=(4, 1, 0, 2, 3)).k == (3, 4, 3, 3, 4)
    with pytest.raises(InputError, match="name each layer once"):
        PerLayerTopK.at_mean(3.4, layer_order=(1, 2))


@pytest.mark.parametrize("mean", [1.0, 2.0, 2.75, 4.0])
def test_losses_that_add_are_shared_out_as_the_best_of_all_allocations(mean: float) -> None:
    losses_LK = [
        [9.0, 4.0, 1.0, 0.0],
        [3.0, 1.0, 0.2, 0.0],
        [1.0, 0.5, 0.1, 0.0],
        [2.0, 1.0, 0.4, 0.0],
    ]
    allocations = [k for k in product(range(1, 5), repeat=4) if sum(k) == 4 * mean]
    lost = {k: sum(losses_LK[layer][n - 1] for layer, n in enumerate(k)) for k in allocations}
    assert lost[PerLayerTopK.from_losses(mean, losses_LK).k] == pytest.approx(min(lost.values()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopP(0.0),
        lambda: TopP(1.1),
        lambda: MinP(True),
        lambda: Threshold(float("nan")),
        lambda: Entropy(0.0),
        lambda: Entropy(float("inf")),
        lambda: HigherCriticism(float("nan")),
        lambda: HigherCriticism(1.0, max_k=0),
        lambda: HigherCriticism(1.0, null="backgroud"),
        lambda: RandomK(()),
        lambda: RandomK((0.0, -1.0)),
        lambda: RandomK((1.0,), seed=0.5),  # type: ignore[arg-type]
        lambda: PerLayerTopK(()),
        lambda: PerLayerTopK((0, 1)),
    ],
)
def test_a_value_out_of_range_is_refused(make: Callable[[], Rule]) -> None:
    with pytest.raises(InputError):
        make()
