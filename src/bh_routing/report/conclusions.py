"""Sentences that the numbers decide: the summary on top and the conclusions at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping

from bh_routing.analysis.estimates import MeanInterval
from bh_routing.analysis.quality_row import STATIC
from bh_routing.report import findings
from bh_routing.report.blocks import table
from bh_routing.report.facts import EXPERTS, Facts, known
from bh_routing.report.provenance import left_out_sentence
from bh_routing.report.quality import QualityRow
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
    sentences += [_alpha_sentence(facts), left_out_sentence(facts)]
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
    scored = findings.scored(facts.quality)
    tested = [row for row in scored.whole if not row.is_static]
    if not any(not row.is_static for row in facts.quality):
        return NO_QUALITY
    texts = []
    if tested:
        least = min(tested, key=lambda row: row.delta_nll)
        most = max(tested, key=lambda row: row.delta_nll)
        text = f"{code(least.name)} changes perplexity by {_loss(least)}"
        if most is not least:
            middle = f", the least of {len(tested)}" if len(tested) > 2 else ""
            text += f"{middle}; {code(most.name)} by {_loss(most)}{', the most' if middle else ''}"
        texts = [f"{text}.", static_sentence(tested)]
    texts += partial_sentence(scored)
    return f"**Quality against experts used.** {' '.join(texts)}"


def partial_sentence(scored: findings.Scored) -> list[str]:
    """Name the configurations that were scored on less text than the others."""
    if not scored.partial:
        return []
    shown = (
        f"{code(row.name)} ({row.tokens:,.0f} of {scored.tokens:,} tokens)"
        for row in scored.partial
    )
    return [f"Scored on a part of the text only, so not compared: {listed(shown)}."]


def _loss(row: QualityRow) -> str:
    change = loss_percent(row.perplexity_ratio)
    return f"{change} ({_ends(row)}) at {number(row.mean_experts)} experts"


def _ends(row: QualityRow) -> str:
    if not (math.isfinite(row.low) and math.isfinite(row.high)):
        return "no interval: too few documents"
    low, high = loss_percent(row.ratio_low), loss_percent(row.ratio_high)
    return f"95 % interval {low} to {high}"


def static_sentence(tested: list[QualityRow]) -> str:
    """Set configurations against static top-k, as far as the intervals decide it."""
    groups = {
        answer: [row for row in tested if row.against_static == answer]
        for answer in ("no", "yes", "undecided")
    }
    if not any(groups.values()):
        return (
            "A fixed smaller number of experts wasn't scored near these means, so the loss can't "
            "be set against the simplest alternative; add configurations such as "
            "`{method: topk, k: 4}` and `{method: topk, k: 5}` to see it."
        )
    texts = []
    for answer, how in (("no", "more"), ("yes", "less")):
        if rows := groups[answer]:
            lose = _verb(rows, "loses", "lose")
            texts.append(f"{_names(rows)} {lose} clearly {how} than static top-k")
    if rows := groups["undecided"]:
        texts.append(f"no difference from static top-k is clear for {_names(rows)}")
    return f"At the same mean number of experts {listed(texts)}."


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
    kept = f"{code(base)}{_whose(facts)} keeps {number(facts.table.mean(base, EXPERTS))} experts"
    shares = known({name: facts.compared(name, EXPERTS, "reduction") for name in facts.others})
    if not shares:
        return f"**Experts.** {kept} per token and layer."
    low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    parts = [
        f"{code(name)} {number(facts.table.mean(name, EXPERTS))} ({_less(shares[name])})"
        for name in dict.fromkeys((low, high))
    ]
    return f"**Experts.** {kept} per token and layer, {' and '.join(parts)}."


def _whose(facts: Facts) -> str:
    """Whether the baseline's k is the model's own; empty if that isn't known."""
    own = as_float(facts.model.get("model_top_k"))
    if not math.isfinite(own):
        return ""
    if as_float(facts.config(facts.baseline or "").get("k")) == own:
        return f", the model's own top-{own:g},"
    return f" (the model's own k is {own:g})"


def _less(share: float) -> str:
    if percent(abs(share)) == percent(0):
        return "as many"
    return f"{percent(abs(share))} {'fewer' if share >= 0 else 'more'}"


def time_sentence(facts: Facts) -> str:
    """What that did to the time of a prompt."""
    changes = findings.time_changes(facts.table)
    if not changes:
        return ""
    ends = (f(changes, key=lambda n: changes[n].mean) for f in (min, max))
    span = " to ".join(
        f"{signed_percent(changes[name].mean)} ({code(name)}, {_time_ends(changes[name])})"
        for name in dict.fromkeys(ends)
    )
    doubt = ", but the machine's own speed was not steady" if _is_unsteady(facts) else ""
    return f"**Time.** Against {code(facts.baseline)}: {span}{doubt}."


def _time_ends(change: MeanInterval) -> str:
    if not math.isfinite(change.low):
        return "no interval"
    return f"95 % interval {signed_percent(change.low)} to {signed_percent(change.high)}"


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
    most = max(noise, key=lambda entry: as_float(entry["mean_experts"]))
    at = f"at alpha {as_float(most['alpha']):g}"
    name = most.get("config_name")
    who = f"{code(name)}, {at}," if name else f"{at}, it"
    return f"on pure noise, {who} still keeps {number(most['mean_experts'])} experts."


def _entries(null: dict[str, object]) -> list[dict[str, object]]:
    noise = null.get("noise")
    return [e for e in noise if "mean_experts" in e] if isinstance(noise, list) else []


def _quality_conclusions(facts: Facts) -> list[str]:
    scored = findings.scored(facts.quality)
    tested = [row for row in facts.quality if not row.is_static]
    if not tested:
        return [
            "Nothing here shows that experts can be left out without harm: quality was not "
            "measured. Score it before using any of these configurations."
        ]
    margin = signed_percent(math.expm1(facts.margin), 1)
    groups = {
        f"Within the margin of {margin} perplexity: {{}}.": "within margin",
        f"Beyond the margin of {margin} perplexity, so not free: {{}}.": "beyond margin",
        "Undecided at this amount of text: {}. That isn't evidence of no harm.": "undecided",
        "Without an interval, so without a verdict: {}.": "unknown",
    }
    texts = []
    for text, verdict in groups.items():
        if rows := [row for row in tested if row.verdict == verdict]:
            texts.append(text.format(_names(rows)))
    whole = [row for row in scored.whole if not row.is_static]
    if whole:
        texts.append(static_sentence(whole))
    texts += partial_sentence(scored)
    return [*texts, *([_least(whole)] if len(whole) > 1 else [])]


def _least(rows: list[QualityRow]) -> str:
    """Name the lowest estimate, and whose interval reaches down to its own."""
    best = min(rows, key=lambda row: row.delta_nll)
    near = [row for row in rows if row is not best and not row.low > best.high]
    doubt = ""
    if near:
        verb = _verb(near, "isn't", "aren't")
        doubt = f"; {_names(near)} {verb} clearly apart from it"
    return (
        f"Of the configurations tried, {code(best.name)} has the lowest estimate "
        f"({loss_percent(best.perplexity_ratio)} perplexity at {number(best.mean_experts)} "
        f"experts){doubt}."
    )


def _saving_conclusion(facts: Facts) -> str:
    if not facts.others or facts.baseline is None:
        return ""
    sides = findings.expert_sides(facts.table)
    base = code(facts.baseline)
    groups = {
        "below": f"fewer experts than {base} in {{}}",
        "above": f"more experts than {base} in {{}}",
        "same": f"as many experts as {base} in {{}}",
        "undecided": "no significant difference for {}",
        "unknown": "no test for {}",
    }
    return f"On these prompts: {'; '.join(_grouped(groups, sides))}."


def _grouped(groups: Mapping[str, str], sides: Mapping[str, str]) -> list[str]:
    """Fill each group's text with the names on its side; groups without a name are left out."""
    named = {key: [name for name, side in sides.items() if side == key] for key in groups}
    return [text.format(_some(named[key])) for key, text in groups.items() if named[key]]


def _some(names: list[str]) -> str:
    if len(names) > LISTED:
        return f"{len(names)} configurations"
    return listed(code(name) for name in names)


def _time_conclusion(facts: Facts) -> str:
    sides = {n: findings.side(c) for n, c in findings.time_changes(facts.table).items()}
    if not sides:
        return ""
    experts = findings.expert_sides(facts.table)
    fewer = {name: side for name, side in sides.items() if experts.get(name) == "below"}
    if _is_unsteady(facts):
        what = "fewer experts save time" if fewer else "the configurations differ in time"
        return f"Whether {what} is open: the machine's own speed varied too much."
    base = code(facts.baseline)
    texts = _grouped({"below": f"{{}} took less time than {base}"}, sides)
    texts += _grouped({"above": "{} took longer with fewer experts"}, fewer)
    others = {name: side for name, side in sides.items() if name not in fewer}
    texts += _grouped({"above": "{} took longer"}, others)
    texts += _grouped(
        {
            "undecided": f"no clear difference in time from {base} for {{}}",
            "unknown": "too few times for an interval for {}",
        },
        sides,
    )
    reason = (
        " Leaving out experts saves arithmetic; whether it saves time depends on what else the "
        "machine waits for, and the selection itself costs something."
    )
    failed = "above" in fewer.values()
    start = ""
    if failed and "below" not in fewer.values():
        start = "Fewer experts bought no speed here: "
    sentence = start + "; ".join(texts)
    return f"{sentence[0].upper()}{sentence[1:]}.{reason if failed else ''}"


def _is_unsteady(facts: Facts) -> bool:
    return findings.is_unsteady(facts.table)


def _balance_conclusion(facts: Facts) -> str:
    if facts.baseline is None:
        return ""
    base = _over_noise(facts, facts.baseline)
    sides = {n: s for n, s in findings.balance_sides(facts.table).items() if s != "unknown"}
    if not sides or not math.isfinite(base):
        return ""
    groups = {
        "above": "less evenly in {}",
        "below": "more evenly in {}",
        "same": "as evenly in {}",
        "undecided": "without a clear difference in {}",
    }
    return (
        f"Measured against sampling noise, experts are loaded {listed(_grouped(groups, sides))}, "
        f"compared with {code(facts.baseline)}, whose CV is {number(base, 1)} times that of noise."
    )


def _over_noise(facts: Facts, name: str) -> float:
    return facts.table.mean(name, "load_over_noise")


def _spread_conclusion(facts: Facts) -> str:
    stuck = [
        name
        for name in facts.others
        if facts.config(name).get("method") != STATIC
        and (facts.table.values(name, "std_experts_per_token") == 0).all()
        and len(facts.table.values(name, "std_experts_per_token"))
    ]
    if not stuck:
        return ""
    kept = ", ".join(f"{code(n)} ({number(facts.table.mean(n, EXPERTS))})" for n in stuck[:LISTED])
    more = f" and {len(stuck) - LISTED} more" if len(stuck) > LISTED else ""
    return (
        "These kept the same number of experts for every token of a prompt, as a fixed k does: "
        f"{kept}{more}."
    )
