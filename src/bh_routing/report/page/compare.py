"""Several runs on one page: what differs in how they were made, then what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bh_routing.analysis.nested import flatten
from bh_routing.analysis.results import load_results
from bh_routing.errors import InputError
from bh_routing.report import findings
from bh_routing.report.blocks import text_table
from bh_routing.report.charts.quality import compared_quality
from bh_routing.report.facts import EXPERTS, SPEED, Facts
from bh_routing.report.files import write_text
from bh_routing.report.page.page import Section, facts_of, render, to_html
from bh_routing.report.text import (
    MISSING,
    code,
    interval,
    loss_percent,
    markdown,
    number,
    signed_percent,
)

COMPARED: Final = ("spec", "model", "calibration", "provenance")
UNCOMPARED: Final = frozenset({"spec.output", "spec.resume", "provenance.started_at"})
"""Always different, and no reason for results to differ."""
VALUE_LIMIT: Final = 80


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write one page about several runs.

    Args:
        folders: results folders, two or more.
        output: the page.
    Raises:
        InputError: fewer than two folders.
        ResultsError: one of them isn't a results folder.
    """
    if len(folders) < 2:
        raise InputError(f"a comparison needs two results folders or more, got {len(folders)}")
    runs = dict(zip(_names(folders), (facts_of(load_results(f)) for f in folders), strict=True))
    differences = _differences(runs)
    chart = compared_quality(runs)
    charts = {"compared_quality": chart} if chart else {}
    parts = [
        Section(key="differences", title="What differs", charts={}, text=to_html(differences)),
        Section(key="results", title="What came out", charts=charts, text=to_html(_results(runs))),
    ]
    same = f"{len(runs)} runs; their settings, model and versions are compared first."
    page = render(
        "report.html.j2",
        title=f"Comparison of {len(runs)} runs",
        verdict=[to_html(same)],
        sections=parts,
        data={"experiments": {}, "traces": []},
    )
    return write_text(output, page)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path as tells them apart."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(f for f in resolved if resolved.count(f) > 1)
        raise InputError(f"{twice} is named twice; name different results folders")
    for depth in range(1, 1 + max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return names


def _differences(runs: Mapping[str, Facts]) -> str:
    flat = {
        name: {
            key: value
            for part in COMPARED
            for key, value in flatten(part, facts.run.get(part)).items()
        }
        for name, facts in runs.items()
    }
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = []
    for key in keys:
        values = [values.get(key) for values in flat.values()]
        if key not in UNCOMPARED and any(value != values[0] for value in values[1:]):
            rows.append([code(key), *(_shown(value) for value in values)])
    if not rows:
        return "Nothing: the runs have the same settings, model and versions."
    return text_table(["setting", *(markdown(name, 60) for name in runs)], rows)


def _shown(value: Any) -> str:
    if value is None:
        return MISSING
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return markdown(text, VALUE_LIMIT)


def _results(runs: Mapping[str, Facts]) -> str:
    rows = []
    for run, facts in runs.items():
        losses = {row.name: row for row in facts.quality}
        changes = findings.time_changes(facts.table)
        for name in facts.names:
            loss, change = losses.get(name), changes.get(name)
            ends = (100 * (loss.ratio_low - 1), 100 * (loss.ratio_high - 1)) if loss else ()
            rows.append(
                [
                    code(name),
                    markdown(run, 60),
                    number(facts.table.mean(name, EXPERTS)),
                    number(loss.mean_experts) if loss else MISSING,
                    loss_percent(loss.perplexity_ratio) if loss else MISSING,
                    interval(*ends, 1) if ends else MISSING,
                    number(facts.table.mean(name, SPEED), 1),
                    signed_percent(change.mean, 1) if change else MISSING,
                ]
            )
    rows.sort(key=lambda row: row[0])
    header = ["configuration", "run", "experts, prompts", "experts, text", "perplexity, text",
              "95 % interval, %", "tokens per second", "time against its baseline"]  # fmt: skip
    return text_table(header, rows)
