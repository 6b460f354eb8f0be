"""Sentences that the numbers decide: the summary on top and the conclusions at the end."""

from __future__ import annotations

import math

from bh_routing.report import findings
from bh_routing.report.blocks import table
from bh_routing.report.facts import BALANCE, EXPERTS, Facts, known
from bh_routing.report.quality import QualityRow, reference_at
from bh_routing.report.text import (
    MISSING,
    as_float,
    code,
    listed,
    loss_percent,
    markdown,
    number,
    percent,
    signed_percent,
)

NO_QUALITY = (
    "**Quality was not measured in this run.** The numbers below say how many experts were kept "
    "and how long it took; they don't say whether the model still writes as well."
)
LISTED = 6
"""More configurations than this are counted, not listed."""


def summarise(facts: Facts) -> list[str]:
    """The run in a few sentences, what matters most first."""
    if not facts.names:
        return ["No experiment finished, so there is nothing to report."]
    sentences = [quality_sentence(facts), experts_sentence(facts), time_sentence(facts)]
    sentences += [_alpha_sentence(facts)]
    if failed := facts.table.num_failed:
        sentences.append(f"{failed} of {facts.num_experiments()} experiments failed; see below.")
    return [sentence for sentence in sentences if sentence]


def overview(facts: Facts) -> str:
    """One line a configuration: experts, quality, time."""
    if not facts.names:
        return ""
    losses = {row.name: row for row in facts.quality}
    changes = findings.time_changes(facts.table)
    rows = []
    for name in facts.names:
        row = losses.get(name)
        change = changes.get(name)
        loss = MISSING if row is None else loss_percent(row.perplexity_ratio)
        scored = [
            number(row.mean_experts) if row else MISSING,
            "reference" if row and row.is_reference else loss,
        ]
        rows.append(
            [
                code(name),
                number(facts.table.mean(name, EXPERTS)),
                percent(facts.compared(name, EXPERTS, "reduction")),
                *(scored if losses else []),
                signed_percent(change.mean) if change else MISSING,
            ]
        )
    if not losses:
        return table(["configuration", "experts", "saved", "time"], rows)
    header = ["configuration", "experts, prompts", "saved", "experts, text", "perplexity, text",
              "time"]  # fmt: skip
    why = (
        "The prompts and the evaluation text are different texts, so a rule that chooses by token "
        "keeps different numbers of experts on them."
    )
    return f"{table(header, rows)}\n\n{why}"


def conclude(facts: Facts) -> list[str]:
    """What follows from the numbers, and what doesn't."""
    if not facts.names:
        return []
    sentences = [
        *_quality_conclusions(facts),
        _saving_conclusion(facts),
        _time_conclusion(facts),
        _balance_conclusion(facts),
        _spread_conclusion(facts),
    ]
    return [sentence for sentence in sentences if sentence]


def quality_sentence(facts: Facts) -> str:
    """What the configurations lose, the least and the most, and static top-k beside them."""
    tested = [row for row in facts.quality if not row.is_static]
    if not tested:
        return NO_QUALITY
    least = min(tested, key=lambda row: row.delta_nll)
    most = max(tested, key=lambda row: row.delta_nll)
    text = f"{code(least.name)} changes perplexity by {_loss(least)}"
    if most is not least:
        middle = f", the least of {len(tested)}" if len(tested) > 2 else ""
        text += f"{middle}; {code(most.name)} by {_loss(most)}{', the most' if middle else ''}"
    return f"**Quality against experts used.** {text}. {_static_sentence(facts)}"


def _loss(row: QualityRow) -> str:
    change = loss_percent(row.perplexity_ratio)
    return f"{change} ({_ends(row)}) at {number(row.mean_experts)} experts"


def _ends(row: QualityRow) -> str:
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return "no interval: too few documents"
    low, high = loss_percent(row.ratio_low), loss_percent(row.ratio_high)
    return f"95 % interval {low} to {high}"


def _static_sentence(facts: Facts) -> str:
    tested = [row for row in facts.quality if not row.is_static]
    at_same = {row.name: reference_at(facts.quality, row.mean_experts) for row in tested}
    compared = [row for row in tested if math.isfinite(at_same[row.name])]
    if not compared:
        return (
            "A fixed smaller number of experts wasn't scored near these means, so the loss can't "
            "be set against the simplest alternative; add configurations such as "
            "`{method: topk, k: 4}` and `{method: topk, k: 5}` to see it."
        )
    losing = [row for row in compared if row.delta_nll > at_same[row.name]]
    winning = [row for row in compared if row.delta_nll <= at_same[row.name]]
    texts = []
    if losing:
        texts.append(f"{_names(losing)} {_verb(losing, 'loses', 'lose')} more than static top-k")
    if winning:
        texts.append(f"{_names(winning)} {_verb(winning, 'loses', 'lose')} no more than static "
                     "top-k")  # fmt: skip
    return f"At the same mean number of experts {' and '.join(texts)}."


def _names(rows: list[QualityRow]) -> str:
    return listed(code(row.name) for row in rows)


def _verb(items: list[QualityRow] | list[str], one: str, more: str) -> str:
    return one if len(items) == 1 else more


def experts_sentence(facts: Facts) -> str:
    """How many experts are kept."""
    base = facts.baseline
    if base is None:
        text = f"{findings.experts(facts.table)}. No Top-K configuration was run to compare with."
        return f"**Experts.** {markdown(text, 400)}"
    kept = f"{code(base)} keeps {number(facts.table.mean(base, EXPERTS))} experts"
    shares = known({name: facts.compared(name, EXPERTS, "reduction") for name in facts.others})
    if not shares:
        return f"**Experts.** {kept} per token and layer."
    low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    parts = [
        f"{code(name)} {number(facts.table.mean(name, EXPERTS))} ({_less(shares[name])})"
        for name in dict.fromkeys((low, high))
    ]
    return f"**Experts.** {kept} per token and layer, {' and '.join(parts)}."


def _less(share: float) -> str:
    return f"{percent(abs(share))} {'fewer' if share >= 0 else 'more'}"


def time_sentence(facts: Facts) -> str:
    """What that did to the time of a prompt."""
    changes = findings.time_changes(facts.table)
    if not changes:
        return ""
    ends = (f(changes, key=lambda n: changes[n].mean) for f in (min, max))
    span = " to ".join(
        f"{signed_percent(changes[name].mean)} ({code(name)}, 95 % interval "
        f"{signed_percent(changes[name].low)} to {signed_percent(changes[name].high)})"
        for name in dict.fromkeys(ends)
    )
    doubt = ", but the machine's own speed was not steady" if _is_unsteady(facts) else ""
    return f"**Time.** Against {code(facts.baseline)}: {span}{doubt}."


def _alpha_sentence(facts: Facts) -> str:
    texts = []
    for null in facts.run.get("nulls") or []:
        kind = str(null.get("alpha_is", ""))
        name = code(null.get("name"))
        if kind == "error rate":
            texts.append(f"Under the null {name} alpha is a nominal error rate.")
        elif kind == "knob":
            texts.append(
                f"Under the null {name} alpha is a knob, **not an error rate**: "
                f"{_noise_phrase(null)}"
            )
        elif kind == "nothing":
            texts.append(f"Under the null {name} alpha means nothing; it is a negative control.")
    return f"**What alpha means.** {' '.join(texts)}" if texts else ""


def _noise_phrase(null: dict[str, object]) -> str:
    noise = [entry for entry in _entries(null) if math.isfinite(as_float(entry["mean_experts"]))]
    if not noise:
        return "it sets how many experts are kept, and bounds nothing."
    last = noise[-1]
    return (
        f"on pure noise, at alpha {as_float(last['alpha']):g}, it still keeps "
        f"{number(last['mean_experts'])} experts."
    )


def _entries(null: dict[str, object]) -> list[dict[str, object]]:
    noise = null.get("noise")
    return [e for e in noise if "mean_experts" in e] if isinstance(noise, list) else []


def _quality_conclusions(facts: Facts) -> list[str]:
    tested = [row for row in facts.quality if not row.is_static]
    if not tested:
        return [
            "Nothing here shows that experts can be left out without harm: quality was not "
            "measured. Score it before using any of these configurations."
        ]
    margin = signed_percent(math.expm1(facts.margin), 1)
    within = [row for row in tested if row.verdict == "within margin"]
    beyond = [row for row in tested if row.verdict == "beyond margin"]
    open_ = [row for row in tested if row not in within and row not in beyond]
    texts = []
    if within:
        texts.append(f"Within the margin of {margin} perplexity: {_names(within)}.")
    if beyond:
        texts.append(f"Beyond the margin of {margin} perplexity, so not free: {_names(beyond)}.")
    if open_:
        texts.append(f"Undecided at this amount of text: {_names(open_)}. That isn't evidence of "
                     "no harm.")  # fmt: skip
    static = _static_sentence(facts)
    best = min(tested, key=lambda row: row.delta_nll)
    least = (
        f"Of the configurations tried, {code(best.name)} loses least "
        f"({loss_percent(best.perplexity_ratio)} perplexity at "
        f"{number(best.mean_experts)} experts)."
    )
    return [*texts, static, *([least] if len(tested) > 1 else [])]


def _saving_conclusion(facts: Facts) -> str:
    if not facts.others or facts.baseline is None:
        return ""
    fewer = [n for n in facts.others if _clearly(facts, n, EXPERTS, -1)]
    more = [n for n in facts.others if _clearly(facts, n, EXPERTS, 1)]
    unclear = [n for n in facts.others if n not in fewer and n not in more]
    texts = []
    if fewer:
        texts.append(f"fewer experts than {code(facts.baseline)} in {_some(fewer)}")
    if more:
        texts.append(f"more in {_some(more)}")
    if unclear:
        texts.append(f"no significant difference, or no test, for {_some(unclear)}")
    return f"On these prompts: {'; '.join(texts)}."


def _clearly(facts: Facts, name: str, metric: str, sign: int) -> bool:
    found = facts.compare(name, metric)
    return bool(found.get("significant")) and sign * as_float(found.get("mean_difference")) > 0


def _some(names: list[str]) -> str:
    if len(names) > LISTED:
        return f"{len(names)} configurations"
    return listed(code(name) for name in names)


def _time_conclusion(facts: Facts) -> str:
    changes = findings.time_changes(facts.table)
    slower = [name for name, change in changes.items() if change.low > 0]
    faster = [name for name, change in changes.items() if change.high < 0]
    if not changes:
        return ""
    if _is_unsteady(facts):
        return "Whether fewer experts save time is open: the machine's own speed varied too much."
    reason = (
        " Leaving out experts saves arithmetic; whether it saves time depends on what else the "
        "machine waits for, and the selection itself costs something."
    )
    if slower and not faster:
        return f"Fewer experts bought no speed here: {_some(slower)} took longer.{reason}"
    if faster and not slower:
        return f"{_some(faster)} took less time than {code(facts.baseline)}."
    if not faster and not slower:
        return f"No configuration differs clearly in time from {code(facts.baseline)}."
    return f"{_some(faster)} took less time, {_some(slower)} more.{reason}"


def _is_unsteady(facts: Facts) -> bool:
    return findings.is_unsteady(facts.table)


def _balance_conclusion(facts: Facts) -> str:
    if facts.baseline is None:
        return ""
    base = _over_noise(facts, facts.baseline)
    ratios = {name: _over_noise(facts, name) for name in facts.others}
    ratios = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    if not ratios or not math.isfinite(base):
        return ""
    # A twentieth more or less is within what another set of prompts would change.
    less_even = [name for name, ratio in ratios.items() if ratio > 1.05 * base]
    more_even = [name for name, ratio in ratios.items() if ratio < 0.95 * base]
    alike = [name for name in ratios if name not in less_even and name not in more_even]
    groups = {"less evenly": less_even, "more evenly": more_even, "about as evenly": alike}
    texts = [f"{how} in {_some(names)}" for how, names in groups.items() if names]
    return (
        f"Measured against sampling noise, experts are loaded {listed(texts)}, compared with "
        f"{code(facts.baseline)}, whose CV is {number(base, 1)} times that of noise."
    )


def _over_noise(facts: Facts, name: str) -> float:
    noise = facts.table.mean(name, f"{BALANCE}_noise")
    return facts.table.mean(name, BALANCE) / noise if noise > 0 else math.nan


def _spread_conclusion(facts: Facts) -> str:
    stuck = [
        name
        for name in facts.others
        if facts.table.mean(name, "std_experts_per_token") == 0
        and facts.table.mean(name, EXPERTS) != facts.table.mean(facts.baseline or "", EXPERTS)
    ]
    if not stuck:
        return ""
    kept = ", ".join(f"{code(n)} ({number(facts.table.mean(n, EXPERTS))})" for n in stuck[:LISTED])
    return f"These keep the same number of experts for every token, so they decide nothing: {kept}."
