"""How a budget is shared out over layers by what each loses alone."""

from __future__ import annotations

import pytest

from bh_routing.experiments.variants import MAX_PASSES, LayerLosses, counts_to_measure


def losses(scales: list[float], counts: tuple[int, ...]) -> LayerLosses:
    """Layers that lose in proportion to 1/k - 1/8."""
    return LayerLosses(8, counts, tuple(tuple(s * (1 / c - 1 / 8) for c in counts) for s in scales))


@pytest.mark.parametrize("counts", [(1, 2, 3, 4, 5, 6, 7), (1, 4)])
def test_the_layer_that_loses_most_keeps_most_whatever_was_measured(
    counts: tuple[int, ...],
) -> None:
    # Where losses are s / k, the best k of a layer is proportional to the root of s.
    shared = losses([4.0, 1.0, 0.25], counts).share_out(7 / 3)
    assert shared.k == (4, 2, 1)


def test_equal_layers_share_equally_though_one_measurement_is_noise() -> None:
    found = losses([1.0, 1.0, 1.0], (1, 2, 3, 4, 5, 6, 7))
    noisy = (*found.by_layer[0][:6], -0.001)
    shared = LayerLosses(8, found.counts, (noisy, *found.by_layer[1:])).share_out(4.0)
    assert shared.k == (4, 4, 4)


@pytest.mark.parametrize("layers", [1, 6, 17, 30, 48, 60])
@pytest.mark.parametrize("model_top_k", [2, 4, 8])
def test_many_layers_are_measured_at_fewer_counts(layers: int, model_top_k: int) -> None:
    counts = counts_to_measure(model_top_k, layers)
    assert counts[0] == 1
    assert max(counts) < model_top_k
    assert len(set(counts)) == len(counts)
    assert layers * len(counts) <= MAX_PASSES


def test_a_model_with_one_expert_a_token_has_nothing_to_share() -> None:
    assert LayerLosses(1, (), ((), ())).share_out(1.0).k == (1, 1)
