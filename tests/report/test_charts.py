"""What charts are made of: the scale of losses, bars, heat maps."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from bh_routing.report.charts.marks import Bar, bar_chart, draw_heat_map, loss_axis
from bh_routing.report.charts.style import Picture, inline_svg, look, new_figure


def scaled(losses: list[float]) -> tuple[Figure, list[float]]:
    figure, axes = new_figure(4.0)
    axes.plot([0] * len(losses), losses, "o")
    loss_axis(axes, losses)
    return figure, [float(tick) for tick in axes.get_yticks()]


def heights(figure: Figure, values: list[float]) -> list[float]:
    axes = figure.axes[0]
    points = axes.transData.transform([(0.0, value) for value in values])
    low, high = axes.transAxes.transform([(0.0, 0.0), (0.0, 1.0)])[:, 1]
    return [float((y - low) / (high - low)) for y in points[:, 1]]


def test_losses_of_1_and_500_percent_are_both_readable() -> None:
    figure, ticks = scaled([0.0, 1.0, 2.0, 500.0])
    zero, one, two, most = heights(figure, [0.0, 1.0, 2.0, 500.0])
    assert one - zero > 0.1
    assert two - one > 0.05
    assert most < 1.0
    assert {0.0, 1.0, 500.0} <= set(ticks)


@pytest.mark.parametrize(
    "losses",
    [[0.0], [0.0, 0.02], [-3.0, 4.0], [7.0, 600.0], [-80.0, 1e7], [0.0, 1e22], [math.nan]],
    ids=["none", "tiny", "gain", "no zero", "huge", "largest", "unknown"],
)
def test_ticks_are_few_and_in_sight_whatever_is_lost(losses: list[float]) -> None:
    figure, ticks = scaled(losses)
    assert 1 <= len(ticks) <= 11
    assert all(0.0 <= height <= 1.0 for height in heights(figure, ticks))
    shown = [0.0 if math.isnan(loss) else loss for loss in losses]
    assert all(0.0 <= height <= 1.0 for height in heights(figure, shown))


def test_labels_of_ticks_do_not_overlap() -> None:
    for losses in ([0.0, 600.0], [-40.0, 700.0], [0.0, 5.5], [2.0, 90.0], [0.0, 1e6]):
        figure, _ = scaled(losses)
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
        boxes.sort(key=lambda box: box.y0)
        assert all(a.y1 <= b.y0 for a, b in pairwise(boxes)), losses


def test_bars_leave_out_what_is_unknown() -> None:
    chart = bar_chart("Found", [Bar("a", 1.0), Bar("b", math.nan), Bar("c", 2.0)], "Seconds")
    assert chart.table == [["configuration", "value"], ["a", "1.00"], ["b", "–"], ["c", "2.00"]]
    texts = [text.get_text() for text in chart.picture().axes[0].texts]
    assert texts == ["1.00", "no value", "2.00"]


def test_a_bar_chart_names_its_dots_and_lines_only_where_there_are_any() -> None:
    bars = [Bar("a", 1.0, [0.9, 1.1], 0.8, 1.2, 0.5)]
    full = bar_chart("Found", bars, "Load", dots="prompts", lines="noise")
    assert full.description == "Load by configuration; dots: prompts; lines: noise."
    assert full.table == [["configuration", "value", "low", "high", "noise"],
                          ["a", "1.00", "0.80", "1.20", "0.50"]]  # fmt: skip
    bare = bar_chart("Found", [Bar("a", 1.0)], "Load", dots="prompts", lines="noise")
    assert bare.description == "Load by configuration."


def test_a_cell_says_where_it_is_and_what_it_holds() -> None:
    with look():
        figure = draw_heat_map(
            np.array([[1.0, math.nan], [3.0, 4.0]]), ["a", "<b>"], range(2), ("Layer", "", "n")
        )
    assert [tip[3] for tip in figure.tips] == [
        "a, layer 0: 1.00", "a, layer 1: –", "<b>, layer 0: 3.00", "<b>, layer 1: 4.00",
    ]  # fmt: skip


def test_texts_of_a_chart_stay_text_inside_html() -> None:
    def svg(name: str) -> str:
        chart = bar_chart("Found", [Bar(name, 1.0)], "#1c1f24 and 0.12345")
        with look():
            figure: Picture = chart.views[""]()
        return inline_svg(figure, "salt")

    hostile = svg("</svg><script>alert('\"1\"')</script>")
    assert "<script" not in hostile
    assert hostile.count("</svg>") == 1
    assert ">#1c1f24 and 0.12345<" in hostile
    assert svg("same") == svg("same")
