"""Read a results folder: the single entry point for analysis and report."""

from __future__ import annotations

import logging
import webbrowser
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from bh_routing.analysis.quality_row import STATIC, read_quality
from bh_routing.analysis.speed import read_timings
from bh_routing.errors import ResultsError
from bh_routing.results.files import find_json_object, half_read, planned_keys, read_csv
from bh_routing.results.journal import Entry, Journal, parse_entry, to_values
from bh_routing.results.records import (
    ALTERNATIVES,
    BASELINE,
    CSV_COLUMNS,
    JOURNAL,
    QUALITY_JOURNAL,
    REPORT_HTML,
    RESULTS_CSV,
    RUN_JSON,
    STATUS_FAILED,
    STATUS_OK,
    SUMMARY_JSON,
    TIMING_COLUMNS,
    TIMINGS,
    ExperimentDetail,
    ExperimentRecord,
    QualityRecord,
    journal_seed,
)

_log = logging.getLogger(__name__)

TEXT_COLUMNS: Final = tuple(f.name for f in fields(ExperimentRecord) if f.type == "str")
"""Read literally: a prompt `NA` is a prompt, not a missing value."""


SHOWN: Final = ("avg_experts_per_token", "tokens_per_sec", "expert_utilization_cv")


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Contents of a results folder."""

    folder: Path
    experiments: pd.DataFrame
    """One row per experiment, with the CSV's columns; `attrs` name the run's baseline."""
    details: dict[tuple[str, str], ExperimentDetail] = field(default_factory=dict)
    """(config_name, prompt_text) -> the journal's additional fields; may lack rows."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """run.json; empty if there is none."""
    summary: dict[str, Any] | None = None
    """analysis_summary.json; None if there is none."""
    quality: tuple[QualityRecord, ...] = ()
    """Scored documents, one record per configuration and document; empty if none was scored."""
    timings: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=TIMING_COLUMNS))
    """Interleaved timings, one row per round and configuration; may be empty."""

    def _repr_html_(self) -> str:
        """Show the means of each configuration's finished experiments in a notebook."""
        finished = self.experiments[self.experiments["status"] == STATUS_OK]
        means = finished.groupby("config_name", sort=False)[list(SHOWN)].mean()
        means.insert(0, "experiments", finished.groupby("config_name", sort=False).size())
        return str(means.to_html(float_format=lambda value: f"{value:.3g}"))

    def show(self) -> Path:
        """Open the run's report.html in the browser.

        Returns:
            The report's path, for use without a browser.
        Raises:
            ResultsError: the folder has no report.html.
        """
        page = (self.folder / REPORT_HTML).resolve()
        if not page.is_file():
            raise ResultsError(
                f"no {page}; run: bh_routing.report.page.write_page({str(self.folder)!r})"
            )
        webbrowser.open(page.as_uri())
        return page


def load_results(folder: str | Path) -> Results:
    """Read the experiments of a run, with details, run.json and summary.

    The CSV defines which rows belong to the run (the journal also keeps rows of configurations
    removed since). Without a CSV, the journal's rows are used. A last journal line without a line
    end is an experiment still being written; it is skipped with a warning.

    Args:
        folder: output folder of `bh-routing run`.
    Returns:
        The results, verified to be complete and of this schema.
    Raises:
        ResultsError: the folder is missing or isn't a results folder, or one of its files is
            truncated, invalid or of another schema version.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ResultsError(f"no results folder at {path}; name a folder that a run wrote")
    table, journal = path / RESULTS_CSV, path / JOURNAL
    if not table.is_file() and not journal.is_file():
        raise ResultsError(
            f"{path} holds neither {RESULTS_CSV} nor {JOURNAL}; name a folder that a run wrote"
        )
    run = find_json_object(path / RUN_JSON) or {}
    identity = run.get("identity")
    seed = journal_seed(identity) if isinstance(identity, dict) else None
    planned = planned_keys(run)
    entries = _journal_entries(journal, seed, planned)
    if table.is_file():
        experiments = read_experiments(table)
    else:
        rows = {(e.record.config_name, e.record.prompt_text): to_values(e.record) for e in entries}
        experiments = experiments_frame(rows.values())
    configs = run.get("spec", {}).get("configs", {})
    if BASELINE in run or configs:
        # Runs of older versions record only their rules: the first static top-k is the baseline.
        static = (name for name, config in configs.items() if config.get("method") == "top_k")
        experiments.attrs[BASELINE] = run.get(BASELINE, next(static, None))
    wanted = set(zip(experiments["config_name"], experiments["prompt_text"], strict=True))
    details = {
        key: entry.detail
        for entry in entries
        if (key := (entry.record.config_name, entry.record.prompt_text)) in wanted
    }
    scored = path / QUALITY_JOURNAL
    return Results(
        folder=path,
        experiments=experiments,
        details=details,
        run=run,
        summary=find_json_object(path / SUMMARY_JSON),
        quality=_current(read_quality(scored), run) if scored.is_file() else (),
        timings=read_timings(path / TIMINGS, planned),
    )


def _current(
    records: tuple[QualityRecord, ...], run: Mapping[str, Any]
) -> tuple[QualityRecord, ...]:
    """Drop records that an earlier run of the folder scored and the last run didn't request.

    A configuration has the rule resolved in run.json, and so has an alternative to it; any other
    name is a static reference.
    """
    configs = (run.get("spec") or {}).get("configs")
    if configs is None:
        return records
    added = (run.get(ALTERNATIVES) or {}).get("rules", ())
    configs = {entry["config_name"]: entry["config"] for entry in added} | configs
    scored = (run.get("quality") or {}).get("configs") or {r.config_name for r in records}
    kept = []
    for record in records:
        config = configs.get(record.config_name)
        # Older runs recorded only names, not the rules scored.
        if config is None:
            rule = record.rule or {"method": STATIC}
            is_current = rule["method"] == STATIC and record.config_name in scored
        else:
            rule = {key: value for key, value in config.items() if key != "description"}
            is_current = record.rule == rule if record.rule else record.config_name in scored
        if is_current:
            kept.append(replace(record, rule=rule))
    return tuple(kept)


def read_experiments(path: Path) -> pd.DataFrame:
    """Read a results CSV with typed columns.

    Raises:
        ResultsError: a column is missing, a row is truncated, or a cell has the wrong type.
    """
    return experiments_frame(read_csv(path, CSV_COLUMNS), path)


def experiments_frame(
    records: Iterable[Mapping[str, Any]], source: Path | None = None
) -> pd.DataFrame:
    """Build the table of experiments from records, with typed columns."""
    frame = pd.DataFrame(list(records), columns=None)
    if frame.empty:
        frame = pd.DataFrame(columns=list(CSV_COLUMNS))
    for name in frame.columns:
        if name in TEXT_COLUMNS:
            frame[name] = frame[name].astype(str)
        elif name in CSV_COLUMNS:
            frame[name] = _numbers(frame[name], source)
    unknown = set(frame["status"]) - {STATUS_OK, STATUS_FAILED}
    if unknown:
        raise half_read(source, f"status must be ok or failed, got {sorted(unknown)[0]!r}")
    return frame


def _numbers(column: pd.Series, source: Path | None) -> pd.Series:
    absent = column.isin(["", "nan", "NaN", None]) | column.isna()
    try:
        numbers = column.where(~absent, np.nan).astype(np.float64)
    except (TypeError, ValueError) as error:
        raise half_read(source, f"column {column.name} holds text: {error}") from error
    whole = column.name in ("num_input_tokens", "num_output_tokens")
    return numbers.astype(np.int64) if whole and not absent.any() else numbers


def _journal_entries(path: Path, seed: str | None, planned: Container[str] | None) -> list[Entry]:
    """Return the journal's experiments of the last run, in order."""
    journal = Journal.read(path, parse_entry, seed=seed)
    if journal.torn_bytes:
        _log.warning("%s: the last line has no end; it is being written, and is skipped", path)
    # The others' configurations were removed or redefined since.
    return [entry for entry in journal.items if planned is None or entry.key in planned]
