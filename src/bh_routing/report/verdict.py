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
    tested = [row for row in facts.quality if not row.is_static]
    parts = []
    if tested:
        documents = max(row.documents for row in facts.quality)
        tokens = max(row.tokens for row in facts.quality)
        margin = signed_percent(math.expm1(facts.margin), 1)
        harmless = [code(row.name) for row in tested if row.verdict == "within margin"]
        harmful = [code(row.name) for row in tested if row.verdict == "beyond margin"]
        open_ = len(tested) - len(harmless) - len(harmful)
        claims = [f"{listed(harmless)} within the margin of {margin}"] if harmless else []
        claims += [f"{listed(harmful)} beyond the margin of {margin}"] if harmful else []
        claims += [f"{open_} undecided"] if open_ else []
        parts.append(
            f"Quality was scored on {tokens:,.0f} tokens of {documents:.0f} documents, and its "
            f"intervals are over documents: {'; '.join(claims)}."
        )
    else:
        parts.append("Quality was not scored.")
    prompts = facts.num_prompts()
    parts.append(
        f"Experts and times are of {number(prompts, 0)} prompts on one machine"
        f"{_steadiness(facts)}; they say nothing of other prompts."
    )
    return f"**How sure.** {' '.join(parts)}"


def _steadiness(facts: Facts) -> str:
    if facts.table.speed_ups:
        rounds = max(found.whole.n for found in facts.table.speed_ups.values())
        return f", times of {rounds} rounds side by side"
    steady = "varied too much to compare" if findings.is_unsteady(facts.table) else "was steady"
    return f", whose own speed {steady}"
