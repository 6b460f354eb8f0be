"""Where experts are kept: by layer, how many, which, and how evenly.

Axes: L layers, E experts, C counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from bh_routing.records import ExperimentDetail
from bh_routing.report.facts import Facts, child
from bh_routing.report.page.charts import (
    SEQUENTIAL,
    Chart,
    Figure,
    axis,
    finite,
    finite_list,
)
from bh_routing.report.style import BASELINE_COLOUR, GUIDE_COLOUR, colours_of
from bh_routing.report.text import as_float, number, plain

Details = Mapping[tuple[str, str], ExperimentDetail]
FloatArray = NDArray[np.float64]


def layer_charts(facts: Facts, details: Details) -> list[Chart]:
    """Draw what the journal's details say of the layers; nothing without them."""
    charts = []
    for make in (_mean_by_layer, _counts, _utilisation):
        chart = make(facts, details)
        charts += [chart] if chart else []
    load = _load(facts)
    return [*charts, load] if load else charts


def _summed(
    facts: Facts, details: Details, field: Callable[[ExperimentDetail], list[list[int]]]
) -> dict[str, FloatArray]:
    """Add a table of whole numbers over each configuration's prompts; short rows end in zeros."""
    summed: dict[str, FloatArray] = {}
    for name in facts.names:
        tables = [np.array(field(d), float) for (own, _), d in details.items() if own == name]
        tables = [table for table in tables if table.ndim == 2]
        if tables:
            width = max(table.shape[1] for table in tables)
            padded = [np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables]
            summed[name] = np.sum(padded, axis=0)
    return summed


def _mean_by_layer(facts: Facts, details: Details) -> Chart | None:
    counts = _summed(facts, details, lambda detail: detail.count_histogram)
    if not counts:
        return None
    means = {name: _mean_count(table_LC) for name, table_LC in counts.items()}
    names = list(means)
    spans = {name: float(mean_L.max() - mean_L.min()) for name, mean_L in means.items()}
    widest = max(spans, key=spans.__getitem__)
    low, high = int(means[widest].argmin()), int(means[widest].argmax())
    layers = list(range(len(means[names[0]])))
    finding = (
        f"{plain(widest, 40)} keeps from {number(means[widest][low])} experts in layer {low} to "
        f"{number(means[widest][high])} in layer {high}"
    )
    if spans[widest] == 0:
        finding = "Every configuration keeps as many experts in one layer as in another"
    values = np.stack([means[name] for name in names])
    return Chart(
        key="layer-means",
        finding=finding,
        description="Mean experts kept in each layer, one row a configuration, over all prompts.",
        variants={
            "": {
                "data": [
                    {
                        "type": "heatmap",
                        "z": [finite_list(row) for row in values],
                        "x": layers,
                        "y": [plain(name, 30) for name in names],
                        "colorscale": SEQUENTIAL,
                        "zmin": 0,
                        "colorbar": {"title": {"text": "experts"}},
                        "hovertemplate": "%{y}, layer %{x}: %{z:.2f} experts<extra></extra>",
                    }
                ],
                "layout": {
                    "xaxis": axis("layer", dtick=max(1, len(layers) // 16)),
                    "yaxis": axis("", autorange="reversed"),
                },
            }
        },
        header=("configuration", *(f"layer {layer}" for layer in layers)),
        rows=[(plain(n, 40), *(number(v) for v in means[n])) for n in names],
        height=160 + 34 * len(names),
    )


def _mean_count(table_LC: FloatArray) -> FloatArray:
    counts_C = np.arange(table_LC.shape[1])
    return np.asarray((table_LC * counts_C).sum(axis=1) / table_LC.sum(axis=1))


def _counts(facts: Facts, details: Details) -> Chart | None:
    counts = _summed(facts, details, lambda detail: detail.count_histogram)
    if not counts:
        return None
    palette = colours_of(list(counts))
    pooled = {name: _shares(table_LC.sum(axis=0)) for name, table_LC in counts.items()}
    layers = len(next(iter(counts.values())))
    variants = {"all layers": _bars(pooled, palette)}
    for layer in range(layers):
        one = {name: _shares(table_LC[layer]) for name, table_LC in counts.items()}
        variants[f"layer {layer}"] = _bars(one, palette)
    modes = {name: int(share_C.argmax()) for name, share_C in pooled.items()}
    spread = [name for name, share_C in pooled.items() if share_C.max() < 0.99]
    finding = "Every configuration keeps the same number of experts for almost every token"
    if spread:
        name = min(spread, key=lambda n: float(pooled[n].max()))
        finding = (
            f"{plain(name, 40)} varies most: its commonest count, {modes[name]}, is "
            f"{100 * pooled[name].max():.0f} % of its tokens"
        )
    width = max(map(len, pooled.values()))
    return Chart(
        key="count-histograms",
        finding=finding,
        description="Share of tokens that keep each number of experts, by configuration.",
        variants=variants,
        chooser="Layers",
        header=("configuration", *(str(count) for count in range(width))),
        rows=[
            (plain(n, 40), *(f"{100 * v:.1f} %" for v in np.pad(s, (0, width - len(s)))))
            for n, s in pooled.items()
        ],
    )


def _shares(count_C: FloatArray) -> FloatArray:
    return np.asarray(count_C / max(count_C.sum(), 1.0))


def _bars(shares: Mapping[str, FloatArray], palette: Mapping[str, str]) -> Figure:
    return {
        "data": [
            {
                "type": "bar",
                "name": plain(name, 30),
                "x": list(range(len(share_C))),
                "y": finite_list(100 * share_C),
                "marker": {"color": palette[name]},
                "hovertemplate": "%{x} experts: %{y:.1f} % of tokens",
            }
            for name, share_C in shares.items()
        ],
        "layout": {
            "barmode": "group",
            "xaxis": axis("experts kept", dtick=1),
            "yaxis": axis("share of tokens (%)"),
        },
    }


def _utilisation(facts: Facts, details: Details) -> Chart | None:
    loads = _summed(facts, details, lambda detail: detail.expert_counts)
    if not loads:
        return None
    variants, rows = {}, []
    for name, load_LE in loads.items():
        relative_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-12)
        variants[plain(name, 40)] = _load_map(relative_LE)
        most = np.unravel_index(int(relative_LE.argmax()), relative_LE.shape)
        rows.append(
            (plain(name, 40), str(most[0]), str(most[1]), number(relative_LE.max()),
             str(int((load_LE == 0).sum())))
        )  # fmt: skip
    top = max(rows, key=lambda row: as_float(row[3]))
    return Chart(
        key="utilisation",
        finding=(
            f"The busiest expert, {top[2]} of layer {top[1]} under {top[0]}, takes {top[3]} times "
            "an even share"
        ),
        description=(
            "How often each expert of each layer was kept, over what an even load would give; "
            "one map a configuration."
        ),
        variants=variants,
        chooser="Configuration",
        header=("configuration", "layer", "busiest expert", "times an even share", "never kept"),
        rows=rows,
    )


def _load_map(relative_LE: FloatArray) -> Figure:
    return {
        "data": [
            {
                "type": "heatmap",
                "z": [finite_list(row_E, 3) for row_E in relative_LE],
                "colorscale": SEQUENTIAL,
                "zmin": 0,
                "colorbar": {"title": {"text": "× even"}},
                "hovertemplate": "layer %{y}, expert %{x}: %{z} × even share<extra></extra>",
            }
        ],
        "layout": {"xaxis": axis("expert"), "yaxis": axis("layer", dtick=1, autorange="reversed")},
    }


def _load(facts: Facts) -> Chart | None:
    measured = child(facts.summary, "quality", "load_balance")
    cv = {str(name): child(value, "measures", "cv") for name, value in measured.items()
          if isinstance(value, Mapping)}  # fmt: skip
    cv = {name: found for name, found in cv.items() if found}
    if not cv:
        return None
    values = {name: as_float(found.get("mean")) for name, found in cv.items()}
    noise = {name: as_float(found.get("noise")) for name, found in cv.items()}
    worst = max(values, key=values.__getitem__)
    labels, palette = [plain(name, 24) for name in cv], colours_of(list(cv))
    static = {row.name for row in facts.quality if row.is_static}
    return Chart(
        key="load",
        finding=(
            f"Load is least even under {plain(worst, 40)}: it varies by {number(values[worst])} of "
            f"its mean, where noise alone gives {number(noise[worst])}"
        ),
        description=(
            "Coefficient of variation of expert load on the evaluation text, with what a perfectly "
            "even router would show by chance (open marks, twice its standard deviation)."
        ),
        variants={
            "": {
                "data": [
                    {"type": "scatter", "mode": "markers", "name": "measured", "x": labels,
                     "y": finite_list(list(values.values())),
                     "marker": {"size": 12, "color": [
                         BASELINE_COLOUR if name in static else palette[name] for name in cv]}},
                    {"type": "scatter", "mode": "markers", "name": "sampling noise", "x": labels,
                     "y": finite_list(list(noise.values())),
                     "error_y": {"type": "data", "array": [
                         finite(2 * as_float(found.get("noise_sd"))) for found in cv.values()]},
                     "marker": {"symbol": "diamond-open", "size": 10, "color": GUIDE_COLOUR}},
                ],
                "layout": {
                    "xaxis": axis(""),
                    "yaxis": axis("coefficient of variation", rangemode="tozero"),
                },
            }
        },
        header=("configuration", "CV", "noise alone"),
        rows=[(plain(n, 40), number(values[n], 3), number(noise[n], 3)) for n in cv],
    )  # fmt: skip
