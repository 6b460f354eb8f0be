"""Findings of the quality phase: losses, and comparisons with static top-k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

from bh_routing.analysis.quality_row import QualityRow, read_rows
from bh_routing.report.text import as_float
from bh_routing.stats.clustered import NON_INFERIORITY_MARGIN

Answer = Literal["yes", "no", "undecided", "unknown"]
"""Whether a rule's loss is lower than that of static top-k with the same number of experts: decided
by the interval of the difference, never by its sign."""


@dataclass(frozen=True, kw_only=True)
class QualityFindings:
    """Rows of the quality table, and conclusions from them."""

    rows: Sequence[QualityRow]
    answers: Mapping[str, Answer]
    """Configuration -> answer; static top-k has none."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the whole text."""
        return max((row.tokens for row in self.rows), default=0)

    @property
    def documents(self) -> int:
        """Number of documents of the whole text."""
        return max((row.documents for row in self.rows), default=0)

    @cached_property
    def comparable(self) -> list[QualityRow]:
        """Rows scored on the whole text."""
        most = max(((row.tokens, row.documents) for row in self.rows), default=None)
        return [row for row in self.rows if (row.tokens, row.documents) == most]

    @property
    def partial(self) -> list[QualityRow]:
        """Rows scored on less text, as in an unfinished run: not comparable with others."""
        return [row for row in self.rows if row not in self.comparable]

    @property
    def tested(self) -> list[QualityRow]:
        """Rows of rules other than static top-k."""
        return [row for row in self.rows if not row.is_static]

    @property
    def whole(self) -> list[QualityRow]:
        """Tested rows scored on the whole text."""
        return [row for row in self.comparable if not row.is_static]

    @property
    def least(self) -> QualityRow:
        """Row of `whole` with the lowest estimate."""
        return min(self.whole, key=lambda row: row.delta_nll)

    @property
    def most(self) -> QualityRow:
        """Row of `whole` with the highest estimate."""
        return max(self.whole, key=lambda row: row.delta_nll)

    @property
    def near(self) -> list[QualityRow]:
        """Other rows whose interval isn't entirely above that of the lowest estimate."""
        best = self.least
        return [row for row in self.whole if row is not best
                and not row.delta_nll_low > best.delta_nll_high]  # fmt: skip

    @property
    def against(self) -> dict[str, list[list[QualityRow]]]:
        """Known answer -> a list with the group of rows that have it; empty answers left out."""
        found: dict[str, list[list[QualityRow]]] = {}
        for answer in ("no", "yes", "undecided"):
            rows = [row for row in self.whole if self.answers.get(row.config_name) == answer]
            if rows:
                found[answer] = [rows]
        return found

    @property
    def verdicts(self) -> dict[str, list[list[QualityRow]]]:
        """Verdict on the margin -> a list with the group of rows that have it."""
        found: dict[str, list[list[QualityRow]]] = {}
        for row in self.tested:
            found.setdefault(row.verdict, [[]])[0].append(row)
        return found

    @property
    def by_name(self) -> dict[str, QualityRow]:
        """Configuration -> row."""
        return {row.config_name: row for row in self.rows}

    @property
    def noted(self) -> list[QualityRow]:
        """Rows with a note other than that they are the reference; at most ten."""
        return [row for row in self.rows if row.note and not row.is_reference][:10]

    @property
    def recommended(self) -> QualityRow | None:
        """Row of lowest loss among the rules whose loss is clearly below that of static top-k.

        Each is compared at its own mean number of experts. Without such a rule: the best static
        top-k near these means; None without a comparison.
        """
        paying = [row for rows in self.against.get("yes", ()) for row in rows]
        compared = [row for [rows] in self.against.values() for row in rows]
        most = max((row.mean_experts for row in compared), default=0)
        near = [row for row in self.comparable if row.is_static and row.mean_experts < most + 1]
        static = [row for row in near if not row.is_reference]
        return min(paying or static, key=lambda row: row.delta_nll, default=None)

    def static_there(self, row: QualityRow) -> float:
        """Return static top-k's ratio of perplexities at a row's mean; NaN if unknown."""
        if row.is_static or row not in self.comparable:
            return math.nan
        return math.exp(reference_at(self.comparable, row.mean_experts))


def quality_findings(summary: Mapping[str, Any] | None) -> QualityFindings:
    """Read the quality block of a summary; no rows if quality wasn't measured."""
    block = _block(summary)
    records = block.get("rules")
    rows = [row for row in read_rows(records or []) if math.isfinite(row.delta_nll)]
    compared = block.get("static_top_k")
    tested = compared if isinstance(compared, Mapping) else {}
    answers = {row.config_name: _answer(row, rows, tested) for row in rows if not row.is_static}
    return QualityFindings(rows=rows, answers=answers)


def margin_of(summary: Mapping[str, Any] | None) -> float:
    """Return the non-inferiority margin in nats: that of the summary, or the default."""
    margin = as_float(_block(summary).get("margin"))
    return margin if margin > 0 else NON_INFERIORITY_MARGIN


def reference_at(
    rows: Sequence[QualityRow], mean_experts: float, field: str = "delta_nll"
) -> float:
    """Return the delta_nll of static top-k at this mean, by linear interpolation.

    Between k and k + 1 this is the loss of choosing between the two at random per token. NaN
    outside the range of the scored numbers of experts.
    """
    curve = sorted((row.mean_experts, getattr(row, field)) for row in rows if row.is_static)
    for (x0, y0), (x1, y1) in pairwise(curve):
        # No interpolation over wider gaps: the curve is convex, so the reference would be too high.
        if x0 <= mean_experts <= x1 and 0 < x1 - x0 <= 1.0 + 1e-9:
            return float(y0 + (y1 - y0) * (mean_experts - x0) / (x1 - x0))
    return math.nan


def _answer(row: QualityRow, rows: Sequence[QualityRow], tested: Mapping[str, Any]) -> Answer:
    """Return the paired test's answer; without a test compare intervals, which is stricter."""
    if row.config_name in tested:
        found = tested[row.config_name]
        answer = found.get("answer") if isinstance(found, Mapping) else None
        return answer if answer in ("yes", "no", "undecided") else "unknown"
    same = [r for r in rows if (r.tokens, r.documents) == (row.tokens, row.documents)]
    fields = ("delta_nll_low", "delta_nll_high")
    static_low, static_high = (reference_at(same, row.mean_experts, f) for f in fields)
    low, high = row.delta_nll_low, row.delta_nll_high
    if not math.isfinite(low + high + static_low + static_high):
        return "unknown"
    return "yes" if high < static_low else "no" if low > static_high else "undecided"


def _block(summary: Mapping[str, Any] | None) -> Mapping[str, Any]:
    quality = (summary or {}).get("quality")
    return quality if isinstance(quality, Mapping) else {}
