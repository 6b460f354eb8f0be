from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from bh_routing.errors import InputError
from bh_routing.report.charts.routing import (
    numbers,
    plot_alpha_sensitivity,
    plot_expert_count_distribution,
    plot_expert_utilization,
    plot_layerwise_counts,
    plot_routing_heatmap,
)

COUNTS = np.random.default_rng(0).integers(1, 9, (20, 6))


def title(figure: Figure) -> str:
    return " ".join(figure.get_suptitle().replace("\u00a0", " ").split())


@pytest.mark.parametrize(
    "counts",
    [
        COUNTS,
        COUNTS.ravel().tolist(),
        pd.Series(COUNTS.ravel()),
        torch.tensor(COUNTS),
        torch.tensor(COUNTS, dtype=torch.bfloat16),
        torch.tensor(COUNTS, dtype=torch.float32, requires_grad=True),
    ],
    ids=["array", "list", "series", "tensor", "bfloat16", "needs grad"],
)
def test_counts_come_as_array_series_or_tensor(counts: Any) -> None:
    figure = plot_expert_count_distribution(counts, method_name="bh", alpha=0.05)
    assert title(figure) == (
        f"bh, alpha 0.05: {COUNTS.mean():.2f} experts on average (dashed), "
        f"from 1 to 8 over {COUNTS.size} counts"
    )


def test_each_count_has_a_bar_of_its_share() -> None:
    figure = plot_expert_count_distribution([1, 4, 4, 8])
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.25, 0.5, 0.25]  # type: ignore[attr-defined]


def test_means_a_prompt_are_told_from_counts() -> None:
    figure = plot_expert_count_distribution(pd.Series([4.2, 4.9, 5.1]), method_name="bh")
    assert "from 4.2 to 5.1 over 3 means" in title(figure)


def test_one_value_and_missing_values_are_drawn() -> None:
    assert plot_expert_count_distribution([4.5])
    assert "over 1 counts" in title(plot_expert_count_distribution([8, float("nan")]))


@pytest.mark.parametrize("ending", ["png", "pdf", "svg", "jpg"])
def test_a_figure_is_saved_where_asked(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "new" / f"counts.{ending}"
    plot_expert_count_distribution([1, 2], save_path=str(path))
    assert path.stat().st_size > 1000
    if ending == "png":
        assert imread(path).shape[1] == 810


def test_a_notebook_shows_the_figure() -> None:
    figure: Any = plot_expert_count_distribution([1, 2])
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([], "at least one finite number, got 0 values"),
        ([float("nan")], "at least one finite number"),
        ([-1, 3], "must not be negative, got -1"),
        (["many"], "must be numbers"),
        ([[1], [1, 2]], "must be numbers"),
    ],
)
def test_bad_counts_are_refused_in_a_sentence(counts: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        plot_expert_count_distribution(counts)


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in png, pdf, svg, jpg; got counts\.gif"):
        plot_expert_count_distribution([1], save_path=tmp_path / "counts.gif")


def test_alpha_sensitivity_sorts_by_alpha() -> None:
    figure = plot_alpha_sensitivity([0.1, 0.01], [5.7, 3.6], "background", top_k=8, noise=[6.3, 4])
    assert title(figure) == "background: 3.60 experts at alpha 0.01, 5.70 at 0.1"


def test_alpha_sensitivity_takes_prompts() -> None:
    figure = plot_alpha_sensitivity([0.01, 0.1], torch.tensor([[3.0, 4.0], [5.0, 7.0]]))
    assert title(figure) == "3.50 experts at alpha 0.01, 6.00 at 0.1"


@pytest.mark.parametrize(
    ("alphas", "means", "sentence"),
    [([0.0, 0.1], [1, 2], r"in \(0, 1\), got 0 to 0.1"), ([0.1], [1, 2], "one row for each")],
)
def test_bad_alphas_are_refused(alphas: Any, means: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        plot_alpha_sensitivity(alphas, means)


def test_the_heatmap_names_the_layers_that_differ_most() -> None:
    counts = np.tile([2, 4, 8], (5, 1))
    figure = plot_routing_heatmap(counts, "bh", tokens=["$a", "\n", "c", "漢", "e"])
    assert title(figure) == "bh: fewest experts in layer 0 (2.00), most in layer 2 (8.00)"
    assert title(plot_routing_heatmap([[8, 8]])) == "8.00 experts in every layer"


def test_the_heatmap_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match="two axes"):
        plot_routing_heatmap([1, 2, 3])
    with pytest.raises(InputError, match="tokens must be 5 texts"):
        plot_routing_heatmap(np.ones((5, 2)), tokens=["a"])


def test_utilization_states_the_variation_of_the_load() -> None:
    load = np.array([[0, 10, 20, 10], [10, 10, 10, 10]])
    figure = plot_expert_utilization(load, "bh")
    cv = (load[0].std() / load[0].mean()) / 2
    assert f"CV {cv:.2f}" in title(figure)
    assert "12.5 % of experts unused" in title(figure)
    assert "1.5 times an even load" in title(figure)


def test_utilization_without_assignments_is_refused() -> None:
    with pytest.raises(InputError, match="every number is 0"):
        plot_expert_utilization(np.zeros((2, 4)))


def test_layers_take_one_method_or_several() -> None:
    assert "(layer 0) to 6.00 experts" not in title(plot_layerwise_counts([4.0, 6.0], "bh"))
    assert "4.00 experts (layer 0) to 6.00 (layer 1)" in title(plot_layerwise_counts([4.0, 6.0]))
    figure = plot_layerwise_counts({"bh_strict": COUNTS, "topk_8": np.full((20, 6), 8)})
    assert "bh_strict" in title(figure)
    assert title(plot_layerwise_counts([8, 8])) == "Every layer keeps the same number of experts"
    with pytest.raises(InputError, match="empty mapping"):
        plot_layerwise_counts({})


def test_infinities_become_missing() -> None:
    assert np.isnan(numbers([1.0, float("inf")], "x")).tolist() == [False, True]
