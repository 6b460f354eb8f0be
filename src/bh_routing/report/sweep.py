"""The conclusions of a sweep: tables, pictures and `SWEEP.md`, from its folder alone."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bh_routing.analysis.bootstrap import RESAMPLES
from bh_routing.analysis.quality import QualityOptions
from bh_routing.analysis.quality_row import STATIC
from bh_routing.analysis.sweep import (
    OFF_BUDGET,
    SweepTables,
    analyze_sweep,
)
from bh_routing.analysis.sweep_row import DomainRow, SweepRow, winner_columns
from bh_routing.records import PLOTS
from bh_routing.report.blocks import bullets, picture, section, table, text_table
from bh_routing.report.charts.style import save
from bh_routing.report.charts.sweep import DOMAINS_PLOT, PARETO_PLOT, domains, pareto
from bh_routing.report.facts import child
from bh_routing.report.files import write_bytes, write_text
from bh_routing.report.sweep_against import (
    HOW,
    NAMES,
    WHY_THREE,
    against,
    each_rule,
    winners_table,
)
from bh_routing.report.sweep_verdict import (
    domains_title,
    is_kept_on_the_harder_bar,
    pareto_title,
    series_label,
    verdict,
)
from bh_routing.report.text import (
    MISSING,
    code,
    interval,
    listed,
    loss_percent,
    markdown,
    number,
    percent,
    signed,
)
from bh_routing.results.csv_table import render_csv

SWEEP_CSV: Final = "sweep.csv"
DOMAINS_CSV: Final = "sweep_domains.csv"
WINNERS_CSV: Final = "winners.csv"
SWEEP_MD: Final = "SWEEP.md"


def conclude_sweep(folder: Path, options: QualityOptions | None = None) -> list[Path]:
    """Write the tables, pictures and the report of a sweep into its folder.

    The same records give the same bytes.

    Args:
        folder: holds run.json and quality.jsonl.
        options: resamples and seed of the bootstrap.
    Returns:
        Paths of sweep.csv, sweep_domains.csv, winners.csv, SWEEP.md and the two pictures.
    Raises:
        ResultsError: the folder isn't a sweep's, or a file can't be read whole.
    """
    tables = analyze_sweep(folder, options or QualityOptions())
    whole = pareto(tables.rows, pareto_title(tables.winners))
    by_domain = domains(tables.domains, domains_title(tables.winners, tables.domains))
    return [
        _write_csv(folder / SWEEP_CSV, map(asdict, tables.rows)),
        _write_csv(folder / DOMAINS_CSV, map(asdict, tables.domains)),
        _write_csv(folder / WINNERS_CSV, map(winner_columns, tables.winners)),
        write_text(folder / SWEEP_MD, render_sweep(tables)),
        save(whole.picture(), folder / PLOTS / PARETO_PLOT),
        save(by_domain.picture(), folder / PLOTS / DOMAINS_PLOT),
    ]


def render_sweep(tables: SweepTables) -> str:
    """Render `SWEEP.md`."""
    name = child(tables.sweep.run, "model").get("name")
    parts = [
        f"# Quality at equal cost{': ' + markdown(name, 80) if name else ''}",
        section("Verdict", *verdict(tables)),
        section("Winners", winners_table(tables), WHY_THREE, HOW, _harder_bar(tables)),
        section("Each rule against the references", each_rule(tables)),
        section(
            "Loss against experts",
            picture(PARETO_PLOT, "Increase in perplexity against mean experts, by rule"),
            _points(tables.rows),
            _flags(tables.rows),
            _notes(tables.rows),
        ),
        section(
            "By domain",
            picture(DOMAINS_PLOT, "The same in each domain of the text"),
            _domains(tables.domains),
            "Knobs were set for the whole text, so a rule that chooses by token keeps more experts "
            "in one domain than in another: *drift*. All references are read at the mean of the "
            "domain. Intervals hold one by one here; read the signs.",
        ),
        section("What was measured on what", _provenance(tables)),
        section(
            "Run it again",
            f"    {_command(tables.sweep.run)}",
            "The knobs that were found are in `sweep.json`; `bh-routing evaluate --model MODEL "
            "--config sweep.json` scores them again.",
        ),
        section("Limits", bullets(_limits(tables))),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write_csv(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    return write_bytes(path, render_csv(rows))


def _harder_bar(tables: SweepTables) -> str:
    """How many wins stay wins where the reference is joined on a log scale."""
    texts = []
    for name, shown in NAMES.items():
        won = [row for row in tables.rows if getattr(row, f"beats_{name}") == "yes"]
        kept = sum(is_kept_on_the_harder_bar(row, name) for row in won)
        if won:
            texts.append(f"{kept} of {len(won)} wins over {shown}")
    if not texts:
        return ""
    return (
        "A line between two points of a convex curve lies above it, which flatters the rule. "
        f"Joined on a log scale instead, where the bar is lower, {listed(texts)} remain."
    )


def _points(rows: Sequence[SweepRow]) -> str:
    header = ["rule", "knob", "budget", "experts", "ΔPPL", "ΔNLL", "95 % interval", "KL",
              "same first choice", "vs static top-k", "saved", "p", "domains"]  # fmt: skip
    lines = []
    for row in rows:
        static = row.rule == STATIC
        lines.append(
            [
                code(series_label(row)),
                f"{row.knob:.4g}" if math.isfinite(row.knob) else MISSING,
                f"{row.budget:g}",
                number(row.mean_experts) + ("*" if row.off_budget else ""),
                loss_percent(row.perplexity_ratio),
                signed(row.delta_nll, 4),
                interval(row.delta_nll_low, row.delta_nll_high, 4),
                number(row.kl_mean, 4),
                percent(row.same_top1_share, 1),
                *([MISSING] * 3 if static else against(row, STATIC)),
                f"{row.top_k_domains} of {row.domains}" if row.top_k_at_mean > 0 else MISSING,
            ]
        )
    how = (
        "ΔPPL and ΔNLL are against the model's own top-k; their interval holds for the row alone. "
        "*Domains* counts those where the rule's estimate is below static top-k's, however "
        "clearly; the table by domain has the intervals."
    )
    return f"{table(header, lines)}\n\n{how}"


def _flags(rows: Sequence[SweepRow]) -> str:
    off = [row for row in rows if row.off_budget]
    scored = [row for row in rows if math.isfinite(row.mean_experts)]
    if not off:
        which = "Every point" if len(scored) == len(rows) else "Every scored point"
        return f"{which} keeps within {percent(OFF_BUDGET)} of its budget." if scored else ""
    named = listed(
        f"{code(row.config_name)} ({number(row.mean_experts)} for {row.budget:g})" for row in off
    )
    return (
        f"\\* More than {percent(OFF_BUDGET)} away from the budget: {named}. Knobs are set on "
        "calibration text; each point is compared at the mean that it has here."
    )


def _notes(rows: Sequence[SweepRow]) -> str:
    return bullets(
        f"{code(row.config_name)}: {markdown(row.note, 400)}"
        for row in rows
        if row.note and row.rule != STATIC
    )


def _domains(rows: Sequence[DomainRow]) -> str:
    header = ["rule", "budget", "domain", "experts", "drift", "ΔNLL", "vs static top-k",
              "95 % interval", "saved", "vs top-p", "vs per-layer top-k"]  # fmt: skip
    lines = [
        [
            code(series_label(row)),
            f"{row.budget:g}",
            markdown(row.domain, 30),
            number(row.mean_experts),
            signed(row.drift),
            signed(row.delta_nll, 3),
            signed(row.top_k_difference, 3),
            interval(row.top_k_low, row.top_k_high, 3),
            percent(row.top_k_saved),
            signed(row.top_p_difference, 3),
            signed(row.per_layer_top_k_difference, 3),
        ]
        for row in rows
        if row.rule != STATIC
    ]
    return table(header, lines) if lines else ""


def _provenance(tables: SweepTables) -> str:
    run = tables.sweep.run
    rows = []
    for block in ("model", "text", "calibration", "provenance", "timing"):
        scalars = [
            f"{markdown(key, 40)} {markdown(_shown(value), 80)}"
            for key, value in child(run, block).items()
            if isinstance(value, str | int | float)
            and not (isinstance(value, bool) or key == "command")
        ]
        if scalars:
            rows.append([block, ", ".join(scalars)])
    return text_table(["what", "value"], rows) if rows else ""


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _command(run: Mapping[str, Any]) -> str:
    stored = child(run, "provenance").get("command")
    if isinstance(stored, str) and stored.isprintable():
        return stored
    budgets = ",".join(f"{budget:g}" for budget in child(run, "sweep").get("budgets") or [])
    model = str(child(run, "model").get("name") or "demo")
    quoted = shlex.quote(model) if model.isprintable() else "MODEL"
    tokens = child(run, "text").get("tokens")
    size = f" --tokens {tokens}" if isinstance(tokens, int) else ""
    return f"bh-routing sweep --model {quoted} --budgets {budgets}{size} --output FOLDER"


def _limits(tables: SweepTables) -> list[str]:
    used = max(tables.rows, key=lambda row: row.clusters)
    return [
        f"{used.tokens:,} tokens of {used.documents} documents in {used.clusters} clusters, "
        f"{tables.num_tests} tests. What holds for this text and model need not hold for others.",
        "Loss of the next token is not performance on tasks.",
        "The winner of a budget was picked on this text. The joint intervals allow for the choice; "
        "the estimate itself is a little too good.",
        "Experts kept aren't time saved: nothing here was timed.",
        f"Intervals: studentised bootstrap of whole books, {RESAMPLES:,} resamples unless set "
        "otherwise, each with its own linearised standard error; Student's t below 20 clusters. "
        "In simulations with 42 books joint 95 % intervals hold 95 to 96 % of the time with normal "
        "effects, 91 % with a long tail of books.",
    ]
