"""What generation took: the split into prefill and decode, the speed-up, the price of an expert."""

from __future__ import annotations

import numpy as np

from bh_routing.report import findings
from bh_routing.report.facts import EXPERTS, SECONDS, Facts
from bh_routing.report.page.charts import Chart, axis, finite, finite_list, markers
from bh_routing.report.style import GUIDE_COLOUR, colours_of
from bh_routing.report.text import number, plain, signed_percent

SPLIT = {"prefill_time_sec": "prefill", "decode_time_sec": "decode"}


def time_charts(facts: Facts) -> list[Chart]:
    """Draw times; nothing if no experiment finished."""
    if not facts.names:
        return []
    return [_split(facts), *_change(facts), _latency(facts)]


def _split(facts: Facts) -> Chart:
    labels = [plain(name, 24) for name in facts.names]
    frame = facts.table.frame
    means = {
        column: [
            1000 * float(frame.loc[frame["config_name"] == name, column].astype(float).mean())
            for name in facts.names
        ]
        for column in SPLIT
        if column in frame.columns
    }
    shown = {SPLIT[column]: values for column, values in means.items()}
    decode = shown.get("decode", [])
    share = np.nanmean(decode) / (np.nanmean(decode) + np.nanmean(shown.get("prefill", [0.0])))
    return Chart(
        key="time-split",
        finding=f"Decoding takes {100 * share:.0f} % of the time of a prompt",
        description="Mean milliseconds a prompt in one pass, split into reading it and generating.",
        variants={
            "": {
                "data": [
                    {"type": "bar", "name": part, "x": labels, "y": finite_list(values),
                     "marker": {"color": colour},
                     "hovertemplate": "%{x}: %{y:.1f} ms " + part + "<extra></extra>"}
                    for (part, values), colour in zip(
                        shown.items(), ("#0072b2", "#e69f00"), strict=True)
                ],
                "layout": {
                    "barmode": "stack",
                    "xaxis": axis(""),
                    "yaxis": axis("milliseconds a prompt"),
                },
            }
        },
        header=("configuration", *(f"{part}, ms" for part in shown)),
        rows=[
            (label, *(number(values[i], 1) for values in shown.values()))
            for i, label in enumerate(labels)
        ],
    )  # fmt: skip


def _change(facts: Facts) -> list[Chart]:
    changes = findings.time_changes(facts.table)
    if not changes:
        return []
    labels = [plain(name, 24) for name in changes]
    palette = colours_of(list(changes))
    values = list(changes.values())
    return [
        Chart(
            key="time-change",
            finding=plain(findings.time(facts.table)),
            description=(
                f"Change of generation time against {plain(facts.baseline, 40)}, "
                f"{_basis(facts)} with 95 % intervals; below zero is faster."
            ),
            variants={
                "": {
                    "data": [
                        {"type": "scatter", "mode": "markers", "x": labels,
                         "y": [finite(100 * v.mean) for v in values],
                         "error_y": {"type": "data", "symmetric": False, "color": GUIDE_COLOUR,
                                     "array": [finite(100 * (v.high - v.mean)) for v in values],
                                     "arrayminus": [finite(100 * (v.mean - v.low))
                                                    for v in values]},
                         "marker": {"size": 12, "color": [palette[name] for name in changes]},
                         "hovertemplate": "%{x}: %{y:+.1f} %<extra></extra>"}
                    ],
                    "layout": {
                        "xaxis": axis(""),
                        "yaxis": axis("change in time (%)", zeroline=True),
                        "showlegend": False,
                    },
                }
            },
            header=("configuration", "change", "low", "high"),
            rows=[
                (label, signed_percent(v.mean, 1), signed_percent(v.low, 1),
                 signed_percent(v.high, 1))
                for label, v in zip(labels, values, strict=True)
            ],
        )
    ]  # fmt: skip


def _basis(facts: Facts) -> str:
    if facts.table.speed_ups:
        return "mean over rounds in which all were timed side by side,"
    return "mean over prompts of one pass,"


def _latency(facts: Facts) -> Chart:
    palette, shapes = colours_of(facts.names), markers(facts.names)
    frame = facts.table.frame
    traces = []
    for name in facts.names:
        mine = frame[frame["config_name"] == name]
        per_token = 1000 * mine[SECONDS] / mine["num_output_tokens"].replace(0, np.nan)
        traces.append(
            {"type": "scatter", "mode": "markers", "name": plain(name, 30),
             "x": finite_list(mine[EXPERTS]), "y": finite_list(per_token),
             "marker": {"color": palette[name], "symbol": shapes[name], "size": 8,
                        "opacity": 0.8},
             "hovertemplate": "%{x:.2f} experts, %{y:.2f} ms a token"}
        )  # fmt: skip
    return Chart(
        key="latency",
        finding="Time per generated token against experts kept, prompt by prompt",
        description="One mark a prompt and configuration; one pass, a configuration after another.",
        variants={
            "": {
                "data": traces,
                "layout": {
                    "xaxis": axis("experts kept per token and layer", rangemode="tozero"),
                    "yaxis": axis("milliseconds a generated token", rangemode="tozero"),
                },
            }
        },
    )
