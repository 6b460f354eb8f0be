"""REPORT.md: a run in plain words, with its tables, plots, tests and limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from bh_routing.analysis.results import load_results
from bh_routing.analysis.text_agreement import TextAgreement, text_agreement
from bh_routing.errors import ResultsError
from bh_routing.records import JOURNAL, REPORT_MD, STATUS_OK
from bh_routing.report import provenance, sections
from bh_routing.report.blocks import bullets, section, text_table
from bh_routing.report.conclusions import conclude, overview, summarise
from bh_routing.report.expectations import Line, compare_expectations, count_verdicts
from bh_routing.report.facts import Facts, child
from bh_routing.report.files import read_run, write_text
from bh_routing.report.quality import with_quality
from bh_routing.report.quality_section import quality
from bh_routing.report.table import experiments_of
from bh_routing.report.text import MISSING, markdown, plain


def generate_markdown_report(
    results: pd.DataFrame, summary: dict[str, Any], output_dir: str | Path
) -> Path:
    """Write REPORT.md into `output_dir`.

    Args:
        results: rows as in `bh_routing_results.csv`.
        summary: what `analyze_results` returned; what it lacks prints as a dash.
        output_dir: the results folder; run.json and records.jsonl in it are used where they are.
    Returns:
        The report's path.
    Raises:
        InputError: a needed column is missing.
    """
    folder = Path(output_dir)
    facts = Facts(
        table=experiments_of(results, folder),
        summary=with_quality(summary, folder),
        run=read_run(folder),
        folder=folder,
    )
    text = "\n\n".join(part for part in _parts(facts, results) if part) + "\n"
    return write_text(folder / REPORT_MD, text)


def _parts(facts: Facts, results: pd.DataFrame) -> list[str]:
    failed = _failed(results)
    head = [
        _title(facts),
        _origin(facts),
        section("Summary", bullets(summarise(facts)), overview(facts)),
    ]
    if not facts.names:
        return [*head, sections.failures(facts, failed), provenance.settings(facts)]
    return [
        *head,
        quality(facts, _agreement(facts)),
        sections.experts(facts),
        sections.time(facts),
        sections.balance(facts),
        sections.categories(facts),
        sections.tests(facts),
        provenance.nulls(facts),
        _expectations(compare_expectations(facts)),
        section("Conclusions", bullets(conclude(facts))),
        sections.examples(facts),
        sections.failures(facts, failed),
        provenance.settings(facts),
        provenance.limitations(facts),
    ]


def _title(facts: Facts) -> str:
    name = facts.model.get("name")
    return f"# BH routing against Top-K{': ' + markdown(name, 80) if name else ''}"


def _origin(facts: Facts) -> str:
    started = plain(child(facts.run, "provenance").get("started_at"))[:10]
    counts = (
        f"{len(facts.names)} configurations on {facts.num_prompts()} prompts, "
        f"{len(facts.table.frame)} finished experiments"
    )
    when = f", {markdown(started)}" if started else ""
    return f"{counts}{when}. Made from the files in this folder."


def _expectations(lines: list[Line]) -> str:
    counts = count_verdicts(lines)
    rows = [
        [line.subject, line.expected, line.measured or MISSING, f"**{line.verdict}**", line.why]
        for line in lines
    ]
    tally = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return section(
        "Expected and measured",
        "What was expected of OLMoE-1B-7B with the five standard configurations, beside what "
        f"this run measured: {tally}.",
        text_table(["expectation", "expected", "measured", "verdict", "why"], rows),
    )


def _failed(results: pd.DataFrame) -> list[tuple[str, str, str]]:
    if "status" not in results.columns:
        return []
    rows = results[results["status"] != STATUS_OK]
    errors = rows["error"] if "error" in rows.columns else [""] * len(rows)
    return [
        (str(name), str(prompt), str(error))
        for name, prompt, error in zip(
            rows["config_name"], rows["prompt_text"], errors, strict=True
        )
    ]


def _agreement(facts: Facts) -> dict[str, TextAgreement]:
    """Agreement of the generated tokens with the baseline's, where the journal is there."""
    if facts.baseline is None or not (facts.folder / JOURNAL).is_file():
        return {}
    try:
        details = load_results(facts.folder).details
    except ResultsError:
        return {}  # the table in hand is whole; only this one section needs the journal
    here = set(zip(facts.table.frame["config_name"], facts.table.frame["prompt_text"], strict=True))
    kept = {key: detail for key, detail in details.items() if key in here}
    return text_agreement(kept, facts.baseline)
