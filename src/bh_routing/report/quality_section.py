"""The leading section: what leaving experts out costs in quality."""

from __future__ import annotations

import math

from bh_routing.analysis.text_agreement import TextAgreement
from bh_routing.report import findings
from bh_routing.report.blocks import picture, section, table
from bh_routing.report.conclusions import partial_sentence
from bh_routing.report.facts import Facts
from bh_routing.report.figures import QUALITY_PLOT
from bh_routing.report.findings import Scored
from bh_routing.report.quality import QualityRow, reference_at
from bh_routing.report.text import (
    MISSING,
    code,
    interval,
    listed,
    loss_percent,
    markdown,
    number,
    p_value,
    percent,
    signed,
    signed_percent,
)


def quality(facts: Facts, agreement: dict[str, TextAgreement]) -> str:
    """Quality against experts used, on the evaluation text and in the generated texts."""
    rows = facts.quality
    texts = _agreement(agreement)
    if not rows:
        return section("Agreement of the generated texts", *texts) if texts else ""
    scored = findings.scored(rows)
    margin = signed_percent(math.expm1(facts.margin), 1)
    how = (
        f"{_text(scored)}, and each is compared with the model's own top-k on each token that it "
        "was scored on. Intervals are over documents. "
        f"*Within margin* means that the one-sided 95 % upper bound stays below {margin} "
        "perplexity; *undecided* isn't *no difference*: see the last column for what this much "
        "text could have found."
    )
    return section(
        "Quality against experts used",
        picture(QUALITY_PLOT, "Change in perplexity against mean experts kept"),
        _losses(rows, scored.whole),
        how,
        _distances(rows),
        "KL is the divergence of the next-token distribution from top-k's, over the whole "
        "vocabulary; *same first choice* is the share of tokens where both rank the same token "
        "first; *overlap* is the Jaccard overlap of the kept experts with top-k's. Losses are "
        "shown for early and late positions of a window, since dropped experts may compound.",
        *_notes(rows),
        *partial_sentence(scored),
        *(markdown(note, 300) for note in facts.quality_notes),
        *texts,
    )


def _text(scored: Scored) -> str:
    size = f"{scored.tokens:,} tokens of {scored.documents} documents"
    if not scored.partial:
        return f"Every configuration was scored on the same {size}"
    return f"{listed(code(row.name) for row in scored.whole)} were scored on the same {size}"


def _losses(rows: list[QualityRow], comparable: list[QualityRow]) -> str:
    header = ["configuration", "experts", "perplexity", "95 % interval, %", "ΔNLL",
              "static top-k there", "p corrected", "verdict", "detectable"]  # fmt: skip
    lines = []
    for row in rows:
        own = row.is_static
        static = reference_at(comparable, row.mean_experts) if row in comparable else math.nan
        ends = 100 * (row.ratio_low - 1), 100 * (row.ratio_high - 1)
        lines.append(
            [
                code(row.name),
                number(row.mean_experts),
                "0 %" if row.is_reference else loss_percent(row.perplexity_ratio),
                MISSING if row.is_reference else interval(*ends, 1),
                "0" if row.is_reference else signed(row.delta_nll, 4),
                MISSING if own else loss_percent(math.exp(static)),
                p_value(row.p_corrected),
                "the reference" if row.is_reference else markdown(row.verdict, 30),
                loss_percent(math.exp(row.detectable)) if row.detectable > 0 else MISSING,
            ]
        )
    return table(header, lines)


def _distances(rows: list[QualityRow]) -> str:
    header = ["configuration", "KL mean", "KL 99 %", "same first choice", "RMS Δp", "overlap",
              "ΔNLL early", "ΔNLL late"]  # fmt: skip
    lines = [
        [
            code(row.name),
            number(row.kl_mean, 4),
            number(row.kl_p99),
            percent(row.same_top1_share, 1),
            number(row.rms_delta_p, 3),
            number(row.top_k_overlap),
            signed(row.early, 3),
            signed(row.late, 3),
        ]
        for row in rows
        if not row.is_reference
    ]
    return table(header, lines) if lines else ""


def _notes(rows: list[QualityRow]) -> list[str]:
    notes = [f"{code(row.name)}: {markdown(row.note, 300)}" for row in rows if row.note]
    return [" ".join(note for note in notes[:10])] if notes and not _all_reference(rows) else []


def _all_reference(rows: list[QualityRow]) -> bool:
    return all(row.is_reference or not row.note for row in rows)


def _agreement(agreement: dict[str, TextAgreement]) -> list[str]:
    shown = {name: found for name, found in agreement.items() if found.prompts}
    if not shown:
        return []
    header = ["configuration", "prompts", "identical texts", "common start", "95 % interval, %",
              "same token", "median common start"]  # fmt: skip
    rows = [
        [
            code(name),
            number(found.prompts, 0),
            number(found.identical, 0),
            percent(found.prefix_share),
            interval(100 * found.prefix_share_low, 100 * found.prefix_share_high, 0),
            percent(found.agreement_share),
            f"{number(found.prefix_tokens_median, 0)} tokens",
        ]
        for name, found in shown.items()
    ]
    return [
        "The generated texts, beside the baseline's: *common start* is the longest common prefix "
        "as a share of the longer text, *same token* the share of positions that agree. After the "
        "first difference greedy texts go their own ways, so this says when they part, not "
        "whether the other text is worse.",
        table(header, rows),
    ]
