"""Pictures of a calibration: one page a null, more where there are many layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bh_routing.errors import CalibrationError
from bh_routing.report.charts.calibration import NullSample, draw_null, finding, plot_calibration
from bh_routing.report.charts.style import look
from tests.nulls.test_calibration import make


def panel(fraction_small: float) -> NullSample:
    p = np.concatenate([np.full(round(100 * fraction_small), 0.01), np.full(300, 0.5)])
    scores = np.sort(np.random.default_rng(0).normal(size=p.size))
    return NullSample(label="layer 7", reference_N=scores, observed_M=scores + 1, p_M=p)


def test_a_null_has_a_page_and_each_layer_a_row(tmp_path: Path) -> None:
    path = make().save(tmp_path / "c.safetensors")
    pages = plot_calibration(path, tmp_path / "plots")
    assert [page.name for page in pages] == ["calibration_pooled.png"]
    with look():
        figure = draw_null("pooled", [panel(0.0), panel(1.0)])
    labels = [axes.get_ylabel() for axes in figure.axes[::3]]
    assert labels == ["layer 7", "layer 7"]
    assert len(figure.axes) == 6


def test_the_title_says_how_far_scores_are_from_the_null() -> None:
    title = finding("pooled", [panel(0.0), panel(1.0)])
    assert title == "pooled: 0 to 25 % of all scores have p ≤ 0.05, 5 % if all came from the null"
    assert "of all slots" in finding("needed", [panel(0.0)])


def test_a_calibration_without_observed_scores_says_what_to_do(tmp_path: Path) -> None:
    path = make(observed={}).save(tmp_path / "c.safetensors")
    with pytest.raises(CalibrationError, match=r"holds no observed scores.*calibrate again"):
        plot_calibration(path, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
