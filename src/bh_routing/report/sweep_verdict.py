"""What a sweep found, in sentences that its statistics decide."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.sweep import (
    ALL_RULES,
    PER_LAYER,
    TOP_P,
    SweepTables,
)
from bh_routing.analysis.sweep_equal_cost import SIGNIFICANCE_LEVEL
from bh_routing.analysis.sweep_row import DomainRow, SweepRow, Winner
from bh_routing.report.text import code, listed, number, p_value, percent, plain

UNDECIDED = "no difference that would hold for all comparisons together"


def series_label(row: SweepRow | DomainRow) -> str:
    """Name a rule and its variant, once each.

    A variant's label may begin with the rule's own name.
    """
    if not row.variant or row.variant.startswith(row.rule):
        return row.variant or row.rule
    return f"{row.rule} {row.variant}"


def verdict(tables: SweepTables) -> list[str]:
    """A sentence against each reference, and one on the best BH rule by domain."""
    overall = [w for w in tables.winners if w.among == ALL_RULES]
    if not any(winner.row for winner in overall):
        return ["No point could be compared with static top-k at its own mean number of experts."]
    sentences = [_against_top_k(overall), _against_curve(overall, TOP_P, "top-p")]
    if any(row.rule == PER_LAYER for row in tables.rows):
        sentences.append(_against_curve(overall, PER_LAYER, "per-layer top-k"))
    own = [w for w in tables.winners if w.among != ALL_RULES]
    return [*sentences, *([_bh(own, tables.domains)] if own else [])]


def pareto_title(winners: Sequence[Winner]) -> str:
    """State who beats static top-k at equal cost, and by how much."""
    known = [w for w in winners if w.among == ALL_RULES and w.row]
    clear = [w for w in known if w.beats_top_k == "yes"]
    if not known:
        return "Loss and experts of each rule"
    if not clear:
        return "No rule clearly loses less than static top-k with as many experts"
    names = {series_label(w.row) for w in clear if w.row}
    who = plain(names.pop()) if len(names) == 1 else "The best rule"
    saves = f"{who} saves {_span(clear)} of static top-k's loss"
    if len(clear) == len(known):
        return f"{saves} with as many experts"
    return f"At {_budgets(clear)} {saves[0].lower() + saves[1:]}"


def domains_title(winners: Sequence[Winner], domains: Sequence[DomainRow]) -> str:
    """State in how many domains the winners clearly lose less than static top-k."""
    rows = [w.row for w in winners if w.among == ALL_RULES and w.row]
    if not rows:
        return "Loss and experts of each rule by domain"
    clear, of = clear_domains(rows, domains), rows[0].domains
    fewest = min(clear)
    if fewest == of:
        return (
            f"The best rule clearly loses less than static top-k in all {of} domains, at every "
            "budget"
        )
    if max(clear) == 0:
        return "The best rule of a budget clearly loses less than static top-k in no domain"
    span = f"{fewest}" if fewest == max(clear) else f"{fewest} to {max(clear)}"
    return f"The best rule of a budget clearly loses less than static top-k in {span} of {of} " \
           "domains"  # fmt: skip


def clear_domains(rows: Sequence[SweepRow], domains: Sequence[DomainRow]) -> list[int]:
    """Count for each row the domains whose interval against static top-k lies below 0."""
    return [
        sum(d.config_name == row.config_name and d.top_k_high < 0 for d in domains) for row in rows
    ]


def _against_top_k(winners: Sequence[Winner]) -> str:
    parts = []
    for winner in winners:
        row = winner.row
        if row is None:
            parts.append(f"at {number(winner.budget, 1)} nothing could be compared")
            continue
        parts.append(
            f"at {number(row.mean_experts)} experts {code(series_label(row))} "
            f"{_saves(row.top_k_saved)} "
            f"(joint 95 % interval {percent(row.top_k_saved_low)} to "
            f"{percent(row.top_k_saved_high)}, corrected p {p_value(row.top_k_p_corrected)}"
            f"{'' if winner.beats_top_k == 'yes' else ', ' + winner.beats_top_k})"
        )
    return f"**Against static top-k with as many experts**, of its increase in perplexity, " \
           f"{listed(parts)}."  # fmt: skip


def _saves(share: float) -> str:
    return f"saves {percent(share)}" if share >= 0 else f"loses {percent(-share)} more"


def _against_curve(winners: Sequence[Winner], name: str, shown: str) -> str:
    groups = {
        "yes": "the same points lose less at {}",
        "undecided": f"there is {UNDECIDED} at {{}}",
        "no": "they lose more at {}",
        "unknown": "nothing can be compared at {}, for nothing is extrapolated",
    }
    parts = []
    for answer, text in groups.items():
        own = [
            w
            for w in winners
            if w.row and w.row.rule != name and getattr(w.row, f"beats_{name}") == answer
        ]
        if own:
            shares = "" if answer == "unknown" else f" ({_span(own, f'{name}_saved')} saved)"
            parts.append(text.format(_budgets(own)) + shares)
    if not parts:
        return f"**Against {shown}** there is nothing to compare: it is itself what loses least."
    return f"**Against {shown}** {'; '.join(parts)}."


def _bh(winners: Sequence[Winner], domains: Sequence[DomainRow]) -> str:
    rows = [w.row for w in winners if w.row]
    if not rows:
        return "**The best BH-drop variant** could not be compared at any budget."
    texts = []
    shown = ((STATIC, "static top-k"), (TOP_P, "top-p"), (PER_LAYER, "per-layer top-k"))
    for answer, how in (("yes", "less"), ("no", "more")):
        against = [
            (reference, [w for w in winners if getattr(w, f"beats_{name}") == answer])
            for name, reference in shown
        ]
        if parts := [f"than {reference} at {_budgets(own)}" for reference, own in against if own]:
            texts.append(f"clearly loses {how} {listed(parts)}")
    signs = listed(
        f"{clear} of {row.domains} at {number(row.budget, 1)}"
        for clear, row in zip(clear_domains(rows, domains), rows, strict=True)
    )
    found = listed(texts) or "differs clearly from no reference"
    return (
        f"**The best BH-drop variant** {found}. Of static top-k's increase in perplexity it saves "
        f"{_span(winners)} by estimate; domains in which it clearly loses less than static top-k: "
        f"{signs}."
    )


def _budgets(winners: Sequence[Winner]) -> str:
    return f"{listed(f'{w.budget:g}' for w in winners)} experts"


def _span(winners: Sequence[Winner], field: str = "top_k_saved") -> str:
    shares = [getattr(w.row, field) for w in winners if w.row]
    shares = sorted(share for share in shares if math.isfinite(share))
    ends = dict.fromkeys(percent(share) for share in (shares[:1] + shares[-1:]))
    return " to ".join(ends)


def is_kept_on_the_harder_bar(row: SweepRow, reference: str) -> bool:
    """Whether a clear win stays one where the reference's losses are joined on a log scale."""
    gap = getattr(row, f"{reference}_at_mean") - getattr(row, f"{reference}_geometric")
    high, p = getattr(row, f"{reference}_high"), getattr(row, f"{reference}_p_corrected")
    return bool(high + gap < 0 and p < SIGNIFICANCE_LEVEL)
