"""Charts of kept experts by layer: mean, distribution and load.

Axes: L layers, E experts, C counts, N configurations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from bh_routing.report.charts.chart import Chart, chart
from bh_routing.report.charts.marks import Floats, draw_heat_map, table_of
from bh_routing.report.facts import Facts
from bh_routing.report.text import number, plain, short_labels
from bh_routing.results.records import ExperimentDetail


def _summed(
    facts: Facts, table: Callable[[ExperimentDetail], list[list[int]]]
) -> dict[str, Floats]:
    """Sum a table of integers over each configuration's prompts; short rows are zero-padded."""
    tables = {
        name: [
            np.array(table(d), float)
            for (own, _), d in facts.results.details.items()
            if own == name
        ]
        for name in facts.names
    }
    tables = {name: [one for one in own if one.ndim == 2] for name, own in tables.items()}
    width = max((one.shape[1] for own in tables.values() for one in own), default=0)
    return {
        name: np.sum([np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in own], axis=0)
        for name, own in tables.items()
        if own
    }


@chart("layers")
def experts_by_layer(facts: Facts) -> Chart | None:
    """Mean experts by configuration and layer."""
    counts = _summed(facts, lambda detail: detail.count_histogram)
    if not counts:
        return None
    names = list(counts)
    means_NL = np.stack([table @ np.arange(table.shape[1]) for table in counts.values()])
    means_NL /= np.maximum([table.sum(axis=1) for table in counts.values()], 1.0)
    widest = int(np.ptp(means_NL, axis=1).argmax())
    low, high = int(means_NL[widest].argmin()), int(means_NL[widest].argmax())
    finding = "Every configuration keeps as many experts in one layer as in another"
    if means_NL[widest, low] < means_NL[widest, high]:
        finding = (
            f"{plain(names[widest], 40)} keeps from {number(means_NL[widest, low])} experts in "
            f"layer {low} to {number(means_NL[widest, high])} in layer {high}"
        )
    layers = range(means_NL.shape[1])
    return Chart(
        finding=finding,
        description="Mean experts kept by configuration (rows) and layer (columns), all prompts.",
        views={"": lambda: draw_heat_map(means_NL, names, layers, ("Layer", "", "Experts kept"))},
        table=table_of(means_NL, names, (f"layer {layer}" for layer in layers)),
    )


@chart("layers")
def expert_counts(facts: Facts) -> Chart | None:
    """Distribution of the number of experts per token, by configuration and by layer."""
    counts = _summed(facts, lambda detail: detail.count_histogram)
    if not counts:
        return None
    names = list(counts)
    pooled_NC = _percent(np.stack([table_LC.sum(axis=0) for table_LC in counts.values()]))
    width = range(pooled_NC.shape[1])
    labels = "Experts kept", "Layer", "Tokens (%)"
    views = {"all layers": partial(draw_heat_map, pooled_NC, names, width, labels)}
    for label, table_LC in zip(short_labels(names, 40), counts.values(), strict=True):
        layers = range(len(table_LC))
        views[label] = partial(draw_heat_map, _percent(table_LC), layers, width, labels)
    varied = int(pooled_NC.max(axis=1).argmin())
    finding = "Every configuration keeps the same number of experts for almost every token"
    if pooled_NC[varied].max() < 99.0:
        finding = (
            f"{plain(names[varied], 40)} varies most: its commonest count, "
            f"{pooled_NC[varied].argmax()}, is {pooled_NC[varied].max():.0f} % of its tokens"
        )
    return Chart(
        finding=finding,
        description="Percentage of tokens that keep each number of experts.",
        views=views,
        table=table_of(pooled_NC, names, width),
    )


def _percent(counts_YC: Floats) -> Floats:
    return np.asarray(100 * counts_YC / np.maximum(counts_YC.sum(axis=1, keepdims=True), 1.0))


@chart("layers")
def expert_load(facts: Facts) -> Chart | None:
    """Load of each expert, as a multiple of an even load, by configuration."""
    loads = _summed(facts, lambda detail: detail.expert_load)
    if not loads:
        return None
    views, rows, busiest = {}, [], (0.0, "")
    labels = "Expert", "Layer", "× even load"
    for name, load_LE in zip(short_labels(list(loads), 40), loads.values(), strict=True):
        relative_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-12)
        layers, experts = map(range, load_LE.shape)
        views[name] = partial(draw_heat_map, relative_LE, layers, experts, labels)
        layer, expert = np.unravel_index(int(relative_LE.argmax()), relative_LE.shape)
        most, where = float(relative_LE.max()), f"expert {expert} of layer {layer}"
        rows.append((name, f"{number(most)} ({where})", str(int((load_LE == 0).sum()))))
        busiest = max(busiest, (most, f"{where} under {name}"))
    return Chart(
        finding=f"The busiest expert has {number(busiest[0])} × an even load: {busiest[1]}",
        description="How often each expert (columns) of each layer (rows) was kept, over an even "
        "load; one map per configuration.",
        views=views,
        table=[("configuration", "largest load, × even", "experts never kept"), *rows],
    )
