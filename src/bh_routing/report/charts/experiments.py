"""Charts of experts, load and time by configuration."""

from __future__ import annotations

import math

import numpy as np

from bh_routing.report import findings
from bh_routing.report.charts.chart import Chart, chart
from bh_routing.report.charts.marks import (
    Bar,
    Point,
    add_legend,
    bar_chart,
    draw_heat_map,
    draw_points,
    from_zero,
    table_of,
)
from bh_routing.report.charts.style import BASELINE, Picture, looks_of, new_figure
from bh_routing.report.facts import BALANCE, EXPERTS, SECONDS, Facts, child
from bh_routing.report.text import as_float, number, plain

NOISE = "sampling noise alone"
LOAD = "Variation of expert load (SD / mean)"


def _means(facts: Facts, column: str, reference: str = "") -> list[Bar]:
    """Return one bar per configuration: its mean over prompts, and each prompt as a dot."""
    return [
        Bar(
            name,
            facts.mean_of(name, column),
            [float(value) for value in facts.values(name, column)],
            reference=facts.mean_of(name, reference) if reference else math.nan,
        )
        for name in facts.names
    ]


@chart("layers")
def avg_experts_comparison(facts: Facts) -> Chart:
    """Mean experts by configuration."""
    bars = _means(facts, EXPERTS)
    return bar_chart(
        findings.experts(facts), bars, "Experts kept per token and layer", dots="prompts"
    )


@chart("layers")
def experts_by_category(facts: Facts) -> Chart:
    """Mean experts by configuration and category of prompts."""
    frame, names, categories = facts.frame, facts.names, facts.groups
    means = frame.groupby(["config_name", "prompt_category"])[EXPERTS].mean().unstack()
    means_NC = means.reindex(index=names, columns=categories).to_numpy(np.float64)
    labels = "Category of prompts", "", "Experts kept"
    return Chart(
        finding=findings.by_category(facts),
        description="Mean experts kept by configuration (rows) and category of prompts (columns).",
        views={"": lambda: draw_heat_map(means_NC, names, categories, labels)},
        table=table_of(means_NC, names, categories),
    )


@chart("layers")
def expert_utilization_cv(facts: Facts) -> Chart:
    """Variation of expert load by configuration, with its sampling noise."""
    bars = _means(facts, BALANCE, f"{BALANCE}_noise")
    return bar_chart(findings.balance(facts), bars, LOAD, dots="prompts", lines=NOISE)


@chart("layers")
def load_on_evaluation_text(facts: Facts) -> Chart | None:
    """The same on the evaluation text, whose length keeps noise low."""
    measured = child(facts.summary, "quality", "load_balance")
    found = {str(name): child(measured, name, "measures", "cv") for name in measured}
    grey = {row.config_name: BASELINE for row in facts.quality.rows if row.is_static}
    bars = [
        Bar(
            name,
            as_float(cv.get("mean")),
            reference=as_float(cv.get("noise")),
            colour=grey.get(name, ""),
        )
        for name, cv in found.items()
        if cv
    ]
    if not bars:
        return None
    worst = max(bars, key=lambda bar: bar.value)
    finding = (
        f"On the evaluation text load is least even under {plain(worst.name, 40)}: SD / mean "
        f"{number(worst.value)}, where noise alone gives {number(worst.reference)}"
    )
    return bar_chart(finding, bars, LOAD, lines=NOISE)


def _times(facts: Facts) -> tuple[list[Bar], str, str]:
    """Return bars of time, their axis label, and the meaning of their dots.

    From interleaved rounds, in percent of the baseline's time in the same round; for older runs per
    prompt.
    """
    rounds = {
        name: found
        for name, found in facts.speed_ups.items()
        if found.rounds and np.isfinite([*found.rounds, found.change.mean]).all()
    }
    if rounds:
        bars = [
            Bar(
                name,
                100 * (1 + found.change.mean),
                [100 * ratio for ratio in found.rounds],
                100 * (1 + found.change.low),
                100 * (1 + found.change.high),
            )
            for name, found in rounds.items()
        ]
        return bars, f"Generation time (% of {findings.show(facts.baseline)})", "rounds"
    # Per token: sequence lengths differ between prompts, which isn't an effect of the rule.
    tokens = facts.frame["num_output_tokens"].where(facts.frame["num_output_tokens"] > 0)
    frame = facts.frame.assign(latency=1000.0 * facts.frame[SECONDS] / tokens)
    values = {n: frame.loc[frame["config_name"] == n, "latency"].dropna() for n in facts.names}
    bars = [Bar(name, float(own.mean()), list(own)) for name, own in values.items()]
    return bars, "Time per generated token (ms)", "prompts"


@chart("time")
def inference_time_comparison(facts: Facts) -> Chart:
    """Time by configuration, relative to the baseline if rounds were timed."""
    bars, label, dots = _times(facts)
    return bar_chart(findings.time(facts), bars, label, dots=dots)


@chart("time")
def experts_vs_latency(facts: Facts) -> Chart:
    """Time against experts, by configuration."""
    bars, label, dots = _times(facts)
    experts = {bar.name: facts.mean_of(bar.name, EXPERTS) for bar in bars}
    looks = looks_of(experts)

    def draw() -> Picture:
        figure, axes = new_figure(3.1 + 0.09 * len(bars))
        for bar in bars:
            at = [experts[bar.name]] * len(bar.dots)
            axes.scatter(at, bar.dots, s=9, color=looks[bar.name][0], alpha=0.4, linewidths=0)
        points = [
            Point(b.name, experts[b.name], b.value, b.low, b.high,
                  f"{plain(b.name, 60)}: {number(experts[b.name])} experts, {number(b.value, 1)}")
            for b in bars
        ]  # fmt: skip
        draw_points(figure, axes, points, looks)
        largest = max([v for b in bars for v in (b.value, *b.dots)], default=math.nan)
        from_zero(axes, x=max(experts.values(), default=math.nan), y=largest)
        axes.grid()
        axes.set(xlabel="Experts kept per token and layer", ylabel=label)
        add_legend(figure, looks)
        return figure

    return Chart(
        finding=findings.latency(facts),
        description=f"{label} against experts kept, by configuration; {dots} as dots.",
        views={"": draw},
    )


@chart("time")
def prefill_and_decode(facts: Facts) -> Chart | None:
    """Time per prompt in one pass over the prompts, split into prefill and decoding."""
    frame = facts.frame
    if "prefill_time_sec" not in frame.columns:
        return None
    times = frame.groupby("config_name")[["prefill_time_sec", "decode_time_sec"]].mean() * 1000.0
    prefill, decode = times["prefill_time_sec"], times["decode_time_sec"]
    bars = [Bar(n, prefill[n] + decode[n], reference=prefill[n]) for n in facts.names]
    share = 100 * float(decode.mean() / (decode.mean() + prefill.mean()))
    finding = f"Decoding takes {number(share, 0)} % of the time of a prompt"
    return bar_chart(finding, bars, "Milliseconds per prompt", lines="end of prefill")
