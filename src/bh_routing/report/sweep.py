"""Write tables, charts and `SWEEP.md` of a sweep, from its folder alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Final

from bh_routing.analysis.quality import QualityOptions
from bh_routing.analysis.sweep import OFF_BUDGET, SweepTables, compare_points
from bh_routing.analysis.sweep_records import read_sweep
from bh_routing.report.charts.style import save
from bh_routing.report.charts.sweep import DOMAINS_PLOT, PARETO_PLOT, domains, pareto
from bh_routing.report.facts import child
from bh_routing.report.markdown import render
from bh_routing.report.sweep_findings import (
    COMPARISONS_CSV,
    POINTS_CSV,
    SweepFacts,
    domains_title,
    pareto_title,
)
from bh_routing.results.files import render_csv, write_bytes, write_text
from bh_routing.results.records import PLOTS
from bh_routing.stats.bootstrap import RESAMPLES

DOMAINS_CSV: Final = "points_by_domain.csv"
SWEEP_MD: Final = "SWEEP.md"


def conclude_sweep(folder: Path, options: QualityOptions | None = None) -> list[Path]:
    """Write the tables, charts and report of a sweep into its folder.

    The output is deterministic.

    Args:
        folder: contains run.json and quality.jsonl.
        options: resamples and seed of the bootstrap; None: the sweep's own seed.
    Returns:
        Paths of the three tables, SWEEP.md and the two charts.
    Raises:
        ResultsError: the folder isn't that of a sweep, or one of its files is damaged.
    """
    sweep = read_sweep(folder)
    seed = child(sweep.run, "provenance").get("seed")
    own = QualityOptions(seed=seed) if isinstance(seed, int) else QualityOptions()
    tables = compare_points(sweep, options or own)
    whole = pareto(tables, pareto_title(tables))
    by_domain = domains(tables, domains_title(tables))
    compared = tables.comparisons
    columns = list(map(str, compared))
    cells = (dict(zip(columns, row, strict=True)) for row in compared.to_numpy())
    return [
        write_bytes(folder / POINTS_CSV, render_csv(map(asdict, tables.points))),
        write_bytes(folder / DOMAINS_CSV, render_csv(map(asdict, tables.by_domain))),
        write_bytes(folder / COMPARISONS_CSV, render_csv(cells, columns)),
        write_text(folder / SWEEP_MD, render_sweep(tables)),
        save(whole.picture(), folder / PLOTS / PARETO_PLOT),
        save(by_domain.picture(), folder / PLOTS / DOMAINS_PLOT),
    ]


def render_sweep(tables: SweepTables) -> str:
    """Render `SWEEP.md`."""
    values = {"facts": SweepFacts(tables), "OFF_BUDGET": OFF_BUDGET, "RESAMPLES": RESAMPLES}
    return render("SWEEP.md.j2", **values)
