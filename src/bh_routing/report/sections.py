"""The measured sections of the report: experts, time, load, categories, tests, texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from bh_routing.analysis.estimates import EXACT_PAIRS, signed_rank_floor
from bh_routing.analysis.speed import Ratio
from bh_routing.report import findings
from bh_routing.report.blocks import bullets, picture, section, table, text_table
from bh_routing.report.facts import BALANCE, EXPERTS, SECONDS, SPEED, Facts
from bh_routing.report.figures import (
    BALANCE_PLOT,
    CATEGORY_PLOT,
    EXPERTS_PLOT,
    LATENCY_PLOT,
    TIME_PLOT,
)
from bh_routing.report.text import (
    MISSING,
    as_float,
    code,
    interval,
    markdown,
    number,
    p_value,
    percent,
    signed,
    signed_percent,
)

METRIC_TITLES: Final = {
    EXPERTS: "Experts kept per token and layer",
    SECONDS: "Generation time per prompt, seconds",
    SPEED: "Speed, generated tokens per second",
    BALANCE: "Coefficient of variation of expert load",
}
TEXT_LIMIT: Final = 200
EXAMPLES: Final = 4
CATEGORY_LIMIT: Final = 8


def experts(facts: Facts) -> str:
    """How many experts were kept."""
    rows = []
    for name in facts.names:
        mean = facts.describe(name, EXPERTS)
        low_n = facts.table.values(name, "min_experts")
        high_n = facts.table.values(name, "max_experts")
        span = MISSING
        if len(low_n) and len(high_n):
            span = f"{number(low_n.min(), 0)} to {number(high_n.max(), 0)}"
        rows.append(
            [
                code(name),
                number(facts.table.mean(name, EXPERTS)),
                interval(mean.get("low"), mean.get("high")),
                number(facts.table.mean(name, "std_experts_per_token")),
                span,
                percent(facts.compared(name, EXPERTS, "reduction"), 1),
            ]
        )
    header = ["configuration", "mean", "95 % interval", "sd of a unit", "range of a unit", "saved"]
    return section(
        "Experts kept",
        picture(EXPERTS_PLOT, "Mean experts by configuration, prompts as points"),
        table(header, rows),
        "A unit is one token in one layer; the mean is over prompts, and its interval speaks of "
        "prompts like these. *Saved* is the mean over prompts of 1 − configuration ÷ baseline.",
    )


def time(facts: Facts) -> str:
    """What generation took."""
    if facts.table.speed_ups:
        return section(
            "Time",
            picture(TIME_PLOT, "Time of a text by configuration, rounds as points"),
            picture(LATENCY_PLOT, "Experts kept against time of a text"),
            *_side_by_side(facts),
        )
    changes = findings.time_changes(facts.table)
    rows = []
    for name in facts.names:
        change = changes.get(name)
        rows.append(
            [
                code(name),
                number(facts.table.mean(name, SECONDS), 3),
                signed_percent(change.mean, 1) if change else MISSING,
                interval(100 * change.low, 100 * change.high, 1) if change else MISSING,
                number(facts.table.mean(name, SPEED), 1),
            ]
        )
    header = ["configuration", "seconds", "change", "95 % interval, %", "tokens per second"]
    return section(
        "Time",
        picture(TIME_PLOT, "Generation time by configuration, prompts as points"),
        picture(LATENCY_PLOT, "Experts kept against time per generated token"),
        table(header, rows),
        "*Change* is the mean over prompts of configuration ÷ baseline − 1. One generation of "
        "each prompt was timed, in the order of the table: the interval covers differences "
        "between prompts, not a machine that speeds up or slows down meanwhile.",
        unsteady(facts),
    )


def _side_by_side(facts: Facts) -> tuple[str, str]:
    """The table of rounds in which all configurations were timed, and what it means."""
    rows = []
    for name, found in facts.table.speed_ups.items():
        ratios = (found.prefill, found.decode, found.whole)
        shown = [_ratio(ratio) for ratio in ratios] if name != facts.baseline else [MISSING] * 3
        rows.append(
            [code(name), number(found.prefill_ms, 1), number(found.decode_ms, 2),
             number(found.tokens_per_second, 1), *shown]
        )  # fmt: skip
    rounds = findings.span_of(found.whole.n for found in facts.table.speed_ups.values())
    header = ["configuration", "prompt, ms", "token, ms", "tokens per second",
              "speed-up, prompt", "speed-up, token", "speed-up, both"]  # fmt: skip
    return (
        table(header, rows),
        f"Medians of {rounds} rounds. A speed-up says how many times as fast as "
        f"{code(facts.baseline)}, with its 95 % interval over rounds. A round times every "
        "configuration on one prompt, in an order drawn anew, after a round that isn't counted, so "
        "a machine that slows down slows all of them alike (`timings.csv`).",
    )


def _ratio(ratio: Ratio) -> str:
    return f"{number(ratio.mean)} [{number(ratio.low)}, {number(ratio.high)}]"


def unsteady(facts: Facts) -> str:
    """A warning if the baseline's own speed varied, which the rule can't be the cause of."""
    if not findings.is_unsteady(facts.table):
        return ""
    return (
        f"**The machine was not steady.** Time per generated token of {code(facts.baseline)} "
        f"alone, whose work is the same for every token, varied by "
        f"{percent(findings.speed_spread(facts.table))} (standard deviation over mean) between "
        "prompts. Configurations ran one after another, so differences in time may be the "
        "machine's; measure on a quiet machine."
    )


def balance(facts: Facts) -> str:
    """How evenly the experts were used."""
    noise_column = f"{BALANCE}_noise"
    rows = []
    for name in facts.names:
        mean, noise = facts.table.mean(name, BALANCE), facts.table.mean(name, noise_column)
        difference = facts.compare(name, BALANCE)
        rows.append(
            [
                code(name),
                number(mean),
                number(noise),
                number(mean / noise if noise > 0 else math.nan, 1) + _times(noise),
                signed(difference.get("mean_difference")),
            ]
        )
    header = ["configuration", "CV", "noise alone", "CV ÷ noise", "against baseline"]
    return section(
        "Load balance",
        picture(BALANCE_PLOT, "Variation of expert load by configuration, with sampling noise"),
        table(header, rows),
        "CV is the standard deviation of the experts' loads over their mean, by layer, then "
        "averaged. *Noise alone* is what a perfectly even router would show with as few tokens: "
        "fewer experts a token means fewer assignments and more noise, so compare the ratio.",
    )


def _times(noise: float) -> str:
    return "×" if noise > 0 else ""


def categories(facts: Facts) -> str:
    """Experts by category of prompts."""
    groups = facts.table.categories
    if groups in ([], [""]):
        return ""
    means = facts.table.frame.groupby(["config_name", "prompt_category"])[EXPERTS].mean()
    shown = groups[:CATEGORY_LIMIT]
    rows = [
        [code(name), *(number(means.get((name, group), math.nan)) for group in shown)]
        for name in facts.names
    ]
    header = ["configuration", *(markdown(group, 30) or "(none)" for group in shown)]
    sizes = facts.table.frame.groupby("prompt_category")["prompt_text"].nunique()
    size = [f"{markdown(group, 30) or '(none)'} {sizes[group]}" for group in shown]
    more = len(groups) - len(shown)
    left_out = f" {more} more categories are in the CSV." if more else ""
    return section(
        "By category",
        picture(CATEGORY_PLOT, "Mean experts by category of prompts and configuration"),
        table(header, rows),
        f"Prompts in each: {', '.join(size)}. So few prompts describe themselves, not a kind "
        f"of text.{left_out}",
    )


def tests(facts: Facts) -> str:
    """Every configuration against the baseline, metric by metric."""
    if not facts.others or facts.baseline is None:
        return ""
    parts: list[str] = []
    notes: dict[str, None] = {}
    for metric, title in METRIC_TITLES.items():
        rows = []
        for name in facts.others:
            found = facts.compare(name, metric)
            if not found:
                continue
            if note := str(found.get("note") or ""):
                notes[f"{code(name)}, {title.lower()}: {markdown(note, 300)}"] = None
            rows.append(_test_row(name, found, 3 if metric == SECONDS else 2))
        if rows:
            header = [title, "n", "difference", "95 % interval", "p", "p corrected", "d",
                      "Wilcoxon p", "significant"]  # fmt: skip
            parts.append(table(header, rows))
    if not parts:
        return ""
    most = max(as_float(facts.compare(n, EXPERTS).get("n", 0)) for n in facts.others)
    how = (
        f"Each row sets a configuration against {code(facts.baseline)} on the same prompts "
        "(n pairs). *p* is the two-sided paired t test, raw, then corrected by Holm over the "
        "configurations of its table; *significant* means corrected p < 0.05. *d* is Cohen's d "
        "for paired data: the mean difference over the standard deviation of the differences. "
        f"{_wilcoxon(most)}All p-values speak of these prompts, not of text in general."
    )
    if facts.table.speed_ups:
        how += (
            " Times and speeds here are of one pass, a configuration after another, so that a "
            "machine that slows down counts as a difference; believe the rounds, under *Time*."
        )
    return section("Statistical tests", how, *parts, bullets(list(notes)[:20]))


def _wilcoxon(most: float) -> str:
    """What the exact signed-rank test can't reach; it isn't used beyond EXACT_PAIRS."""
    if not 0 < most <= EXACT_PAIRS:
        return ""
    return (
        f"An exact Wilcoxon signed-rank test of {number(most, 0)} pairs can't give less than "
        f"{p_value(signed_rank_floor(int(most)))}, however clear the difference. "
    )


def _test_row(name: str, found: Mapping[str, Any], digits: int) -> list[str]:
    return [
        code(name),
        number(found.get("n"), 0),
        signed(found.get("mean_difference"), digits),
        interval(found.get("low"), found.get("high"), digits),
        p_value(found.get("p")),
        p_value(found.get("p_corrected")),
        number(found.get("cohens_d"), 1),
        p_value(found.get("wilcoxon_p")),
        _yes(found),
    ]


def _yes(found: Mapping[str, Any]) -> str:
    if not math.isfinite(as_float(found.get("p_corrected"))):
        return MISSING
    return "yes" if found.get("significant") else "no"


def examples(facts: Facts) -> str:
    """What the configurations wrote: one prompt of each category, four at most."""
    frame = facts.table.frame
    if "generated_text" not in frame.columns:
        return ""
    first = frame.drop_duplicates("prompt_category").head(EXAMPLES)["prompt_text"]
    parts = []
    for prompt in first:
        same = frame[frame["prompt_text"] == prompt].drop_duplicates("config_name")
        rows = [
            [code(row["config_name"]), markdown(row["generated_text"], TEXT_LIMIT) or MISSING]
            for _, row in same.iterrows()
        ][:CATEGORY_LIMIT]
        parts.append(f"**Prompt:** {markdown(prompt, TEXT_LIMIT)}")
        parts.append(text_table(["configuration", "continuation"], rows))
    return section("What was written", *parts)


def failures(facts: Facts, failed: list[tuple[str, str, str]]) -> str:
    """The experiments that failed, each with its reason."""
    if not failed:
        return ""
    rows = [[code(name), markdown(p, 60), markdown(why, 240)] for name, p, why in failed[:20]]
    more = f"{len(failed) - 20} more are in the CSV." if len(failed) > 20 else ""
    what = f"{len(failed)} of {facts.num_experiments()} experiments failed and are left out above."
    return section(
        "Failed experiments", what, text_table(["configuration", "prompt", "reason"], rows), more
    )
