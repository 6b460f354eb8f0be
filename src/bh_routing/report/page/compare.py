"""Compare several runs in one HTML file: differing settings, then results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bh_routing.analysis.results import load_results
from bh_routing.analysis.trackers import flatten
from bh_routing.errors import InputError
from bh_routing.report.charts.quality import compared_quality
from bh_routing.report.facts import Facts, facts_of
from bh_routing.report.files import write_text
from bh_routing.report.markdown import render as render_markdown
from bh_routing.report.page.page import Section, render, to_html

COMPARED: Final = ("spec", "model", "calibration", "provenance")
UNCOMPARED: Final = frozenset({"spec.output", "spec.resume", "provenance.started_at"})
"""Fields that always differ and don't affect results."""


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write an HTML comparison of several runs.

    Args:
        folders: two or more results folders.
        output: HTML file.
    Raises:
        InputError: fewer than two folders.
        ResultsError: one of them isn't a results folder.
    """
    if len(folders) < 2:
        raise InputError(f"a comparison needs two results folders or more, got {len(folders)}")
    runs = dict(zip(_names(folders), (facts_of(load_results(f)) for f in folders), strict=True))
    rendered = render_markdown("comparison.md.j2", runs=runs, differences=_differences(runs))
    differences, results = rendered.split("\n***\n")
    chart = compared_quality(runs)
    charts = {"compared_quality": chart} if chart else {}
    parts = [
        Section(key="differences", title="Differences", charts={}, text=to_html(differences)),
        Section(key="results", title="Results", charts=charts, text=to_html(results)),
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
    """Return the folders' names, with as much of their paths as makes them distinct."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        twice = next(f for f in resolved if resolved.count(f) > 1)
        raise InputError(f"{twice} is named twice; name different results folders")
    for depth in range(1, 1 + max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return names


def _differences(runs: Mapping[str, Facts]) -> list[tuple[str, list[Any]]]:
    """Return the settings that differ, with the value in each run."""
    flat = [
        {k: v for part in COMPARED for k, v in flatten(part, facts.run.get(part)).items()}
        for facts in runs.values()
    ]
    rows = {key: [values.get(key) for values in flat] for found in flat for key in found}
    return [
        (key, list(map(_shown, values)))
        for key, values in rows.items()
        if key not in UNCOMPARED and any(value != values[0] for value in values[1:])
    ]


def _shown(value: Any) -> str | None:
    is_text = value is None or isinstance(value, str)
    return value if is_text else json.dumps(value, ensure_ascii=False)
