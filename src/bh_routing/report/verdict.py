"""The run in three sentences, drawn by rule: what was saved, what it cost, how sure that is."""

from __future__ import annotations

import math

from bh_routing.report import findings
from bh_routing.report.conclusions import experts_sentence, quality_sentence, time_sentence
from bh_routing.report.facts import Facts
from bh_routing.report.text import code, listed, number, signed_percent


def verdict(facts: Facts) -> list[str]:
    """Return the three sentences as Markdown; one if nothing finished."""
    if not facts.names:
        return ["No experiment finished, so there is nothing to report."]
    saved = " ".join(s for s in (experts_sentence(facts), time_sentence(facts)) if s)
    return [saved, quality_sentence(facts), _certainty(facts)]


def _certainty(facts: Facts) -> str:
    scored = findings.scored(facts.quality)
    tested = [row for row in facts.quality if not row.is_static]
    parts = ["Quality was not scored."]
    if tested:
        margin = signed_percent(math.expm1(facts.margin), 1)
        harmless = [code(row.name) for row in tested if row.verdict == "within margin"]
        harmful = [code(row.name) for row in tested if row.verdict == "beyond margin"]
        unknown = sum(row.verdict == "unknown" for row in tested)
        open_ = len(tested) - len(harmless) - len(harmful) - unknown
        claims = [f"{listed(harmless)} within the margin of {margin}"] if harmless else []
        claims += [f"{listed(harmful)} beyond the margin of {margin}"] if harmful else []
        claims += [f"{open_} undecided"] if open_ else []
        claims += [f"{unknown} without an interval"] if unknown else []
        size = "" if not scored.partial else "up to "
        parts = [
            f"Quality was scored on {size}{scored.tokens:,} tokens of {scored.documents} "
            f"documents, and its intervals are over documents: {'; '.join(claims)}."
        ]
    parts.append(
        f"Experts and times are of {number(facts.num_prompts(), 0)} prompts{_machine(facts)}; they "
        "say nothing of other prompts."
    )
    return f"**How sure.** {' '.join(parts)}"


def _machine(facts: Facts) -> str:
    where = findings.place(facts.run)
    text = f" on {where.text}" if where.text else ""
    if facts.table.speed_ups:
        rounds = findings.span_of(found.whole.n for found in facts.table.speed_ups.values())
        return f"{text}, times of {rounds} rounds timed side by side on one machine"
    steady = {
        "unsteady": ", whose own speed varied too much to compare",
        "steady": ", whose own speed was steady" if where.is_one_machine else "",
        "unknown": "",
    }
    return text + steady[findings.steadiness(facts.table)]
