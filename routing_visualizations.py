"""Charts of routing, for scripts and notebooks: a thin wrapper of `bh_routing.report`.

    from routing_visualizations import plot_expert_count_distribution

    plot_expert_count_distribution(counts, method_name="bh_moderate", alpha=0.05,
                                   save_path="counts.png")

Works in a clone without installation.
"""

from __future__ import annotations

import sys
from pathlib import Path

_SOURCE = Path(__file__).resolve().parent / "src"
if (_SOURCE / "bh_routing").is_dir() and str(_SOURCE) not in sys.path:
    sys.path.insert(0, str(_SOURCE))

try:
    from bh_routing.report.charts.routing import (
        plot_alpha_sensitivity,
        plot_expert_count_distribution,
        plot_expert_utilization,
        plot_layerwise_counts,
        plot_routing_heatmap,
    )
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"routing_visualizations.py needs {error.name}; in a clone run: pip install -e . "
        "(elsewhere: pip install bh-routing)",
        name=error.name,
    ) from None

__all__ = [
    "plot_alpha_sensitivity",
    "plot_expert_count_distribution",
    "plot_expert_utilization",
    "plot_layerwise_counts",
    "plot_routing_heatmap",
]
