"""What the p-values rest on: densities, p-values and quantiles of each null, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from bh_routing.analysis.calibration_file import NullSample, read_calibration_samples
from bh_routing.errors import CalibrationError
from bh_routing.records import CALIBRATION
from bh_routing.report.calibration_plots import finding
from bh_routing.report.page.charts import Chart, Figure, axis, finite_list
from bh_routing.report.style import BASELINE_COLOUR, FIXED_COLOURS, GUIDE_COLOUR
from bh_routing.report.text import percent, plain

BINS: Final = 40
P_BINS: Final = 20
QUANTILES: Final = (np.arange(100) + 0.5) / 100
_OBSERVED: Final = FIXED_COLOURS["bh_strict"]


def null_charts(folder: Path) -> list[Chart]:
    """Draw the calibration that lies in the folder; nothing if there is none that can be drawn."""
    try:
        samples = read_calibration_samples(folder / CALIBRATION).samples
    except CalibrationError:
        return []  # no calibration was needed, or an older one holds no observed scores
    return [chart for null, panels in samples.items() for chart in _charts(null, panels)]


def _charts(null: str, panels: Sequence[NullSample]) -> list[Chart]:
    shares = [
        (panel.label, percent(panel.share_below_05, 1), f"{panel.reference_N.size:,}")
        for panel in panels
    ]

    def chart(key: str, title: str, description: str, draw: Callable[..., Figure]) -> Chart:
        return Chart(
            key=f"null-{null}-{key}",
            finding=title,
            description=description,
            variants={panel.label: draw(panel) for panel in panels},
            chooser="Show",
            header=("panel", "observed with p ≤ 0.05", "reference scores"),
            rows=shares if key == "densities" else (),
            height=320,
        )

    name = plain(null, 40)
    densities = chart(
        "densities",
        finding(null, panels),
        f"Density of the reference scores of {name} (grey) and of the observed ones (blue).",
        _densities,
    )
    p_values = chart(
        "p-values",
        f"{name}: density of p-values",
        "The dashed line is what p-values look like when everything comes from the null.",
        _p_values,
    )
    quantiles = chart(
        "quantiles",
        f"{name}: observed against reference quantiles",
        "On the dashed line both distributions agree; above it observed scores are larger.",
        _quantiles,
    )
    return [densities, p_values, quantiles]


def _densities(panel: NullSample) -> Figure:
    both = (panel.reference_N, panel.observed_M)
    ends = np.array([np.quantile(scores, (0.002, 0.998)) for scores in both])
    # Contributions are positive and span decades: their density is by log score.
    is_log = bool(ends.min() > 0)
    space = np.geomspace if is_log else np.linspace
    edges = space(ends[:, 0].min(), ends[:, 1].max(), BINS + 1)
    widths = np.diff(np.log(edges) if is_log else edges)
    middles = finite_list((edges[:-1] + edges[1:]) / 2)
    heights = [np.histogram(s, edges)[0] / s.size / widths for s in both]
    looks = (("reference", BASELINE_COLOUR, "tozeroy"), ("observed", _OBSERVED, "none"))
    return {
        "data": [
            {"type": "scatter", "mode": "lines", "name": name, "x": middles,
             "y": finite_list(height), "fill": fill, "line": {"color": colour, "shape": "hvh"}}
            for (name, colour, fill), height in zip(looks, heights, strict=True)
        ],
        "layout": {
            "xaxis": axis("score", type="log" if is_log else "linear"),
            "yaxis": axis("density", rangemode="tozero"),
        },
    }  # fmt: skip


def _p_values(panel: NullSample) -> Figure:
    edges = np.linspace(0.0, 1.0, P_BINS + 1)
    height = np.histogram(panel.p_M, edges)[0] / panel.p_M.size * P_BINS
    return {
        "data": [
            {"type": "bar", "x": finite_list((edges[:-1] + edges[1:]) / 2),
             "y": finite_list(height), "width": 1.0 / P_BINS, "marker": {"color": _OBSERVED},
             "hovertemplate": "p near %{x:.3f}: density %{y:.2f}<extra></extra>"}
        ],
        "layout": {
            "xaxis": axis("p-value", range=[0, 1]),
            "yaxis": axis("density", rangemode="tozero"),
            "shapes": [_line(0, 1, 1, 1)],
        },
    }  # fmt: skip


def _quantiles(panel: NullSample) -> Figure:
    reference = np.quantile(panel.reference_N, QUANTILES)
    observed = np.quantile(panel.observed_M, QUANTILES)
    low, high = float(reference[0]), float(reference[-1])
    return {
        "data": [
            {"type": "scatter", "mode": "markers", "x": finite_list(reference),
             "y": finite_list(observed), "marker": {"color": _OBSERVED, "size": 6},
             "hovertemplate": "reference %{x:.3g}, observed %{y:.3g}<extra></extra>"}
        ],
        "layout": {
            "xaxis": axis("reference quantile"),
            "yaxis": axis("observed quantile"),
            "shapes": [_line(low, low, high, high)],
        },
    }  # fmt: skip


def _line(x0: float, y0: float, x1: float, y1: float) -> dict[str, object]:
    line = {"color": GUIDE_COLOUR, "width": 1, "dash": "dash"}
    return {"type": "line", "x0": x0, "y0": y0, "x1": x1, "y1": y1, "line": line}
