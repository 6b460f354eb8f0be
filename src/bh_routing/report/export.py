"""Export results to a spreadsheet, a paper or another program."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pandas as pd

from bh_routing.analysis.results import Results, load_results
from bh_routing.errors import InputError, unknown_name
from bh_routing.report.facts import BALANCE, EXPERTS, METRICS, SECONDS, SPEED, Facts, facts_of
from bh_routing.report.text import as_float, latex, number, signed, spreadsheet
from bh_routing.results.files import render_json, write_bytes
from bh_routing.results.records import SCHEMA_VERSION, column_definitions

ENDINGS: Final = {"xlsx": "xlsx", "latex": "tex", "json": "json"}
STEM: Final = "bh_routing_results"
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def export_results(folder: str | Path, to: str, output: str | Path | None = None) -> Path:
    """Write the results of a run in another format.

    Strings that a spreadsheet would run as a formula are exported as text, and control characters
    are removed in every format; the CSV in the folder is unchanged.

    Args:
        folder: output folder of `bh-routing run`.
        to: xlsx, latex or json.
        output: output file; by default bh_routing_results with the format's suffix, in `folder`.
    Returns:
        Path of the output file.
    Raises:
        InputError: the format is unknown, the results folder can't be read, the output is a folder
            or a file of the run, or openpyxl isn't installed.
    """
    if to not in ENDINGS:
        raise unknown_name("format", to, ENDINGS)
    results = load_results(folder)
    path = Path(output) if output is not None else results.folder / f"{STEM}.{ENDINGS[to]}"
    _check_output(path, results.folder, ENDINGS[to])
    facts = facts_of(results)
    write = {"xlsx": _workbook, "latex": _latex, "json": _json}[to]
    return write_bytes(path, write(results, facts))


def _check_output(path: Path, folder: Path, ending: str) -> None:
    if path.is_dir():
        raise InputError(f"output must be a file, got the folder {path}; add a file name")
    if path.suffix.lower() != f".{ending}":
        raise InputError(f"output must end in .{ending}, got {path.name}; rename it")
    inside = path.resolve().parent == folder.resolve()
    if inside and path.name in ("run.json", "analysis_summary.json"):
        raise InputError(f"{path.name} belongs to the run; choose another name for the export")


def _json(results: Results, facts: Facts) -> bytes:
    content = {
        "schema_version": SCHEMA_VERSION,
        "columns": column_definitions(),
        "run": results.run,
        "summary": facts.summary,
        "experiments": results.experiments.to_dict(orient="records"),
    }
    return render_json(_visible(content))


def _visible(value: Any) -> Any:
    """Remove control characters other than line breaks and tabs from every string."""
    if isinstance(value, str):
        return _CONTROL.sub("", value)
    if isinstance(value, Mapping):
        return {_visible(str(key)): _visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(item) for item in value]
    return value


def _workbook(results: Results, facts: Facts) -> bytes:
    definitions = pd.DataFrame(column_definitions().items(), columns=["column", "definition"])
    sheets = {
        "configurations": _means(facts),
        "comparisons": _comparisons(facts),
        "experiments": results.experiments,
        "columns": definitions,
    }
    buffer = io.BytesIO()
    try:
        writer = pd.ExcelWriter(buffer, engine="openpyxl")
    except ModuleNotFoundError:
        raise InputError(
            "the export to xlsx needs openpyxl, which isn't installed; run: pip install openpyxl"
        ) from None
    with writer:
        for title, frame in sheets.items():
            cells = frame.astype(object).map(_cell)
            cells.to_excel(writer, sheet_name=title, index=False, freeze_panes=(1, 0))
            for column in writer.sheets[title].columns:
                width = writer.sheets[title].column_dimensions[column[0].column_letter]
                width.width = min(max(len(str(column[0].value)) + 2, 12), 40)
    return buffer.getvalue()


def _cell(value: Any) -> float | int | str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return value if math.isfinite(value) else None
    return None if value is None else spreadsheet(value)


def _means(facts: Facts) -> pd.DataFrame:
    rows = {
        name: {
            "experiments": len(facts.values(name, EXPERTS)),
            "experts": facts.mean_of(name, EXPERTS),
            "experts_sd": as_float(facts.describe(name, EXPERTS).get("sd")),
            "reduction_share": facts.compared(name, EXPERTS, "reduction"),
            "seconds": facts.mean_of(name, SECONDS),
            "tokens_per_second": facts.mean_of(name, SPEED),
            "load_cv": facts.mean_of(name, BALANCE),
            "load_cv_noise": facts.mean_of(name, f"{BALANCE}_noise"),
        }
        for name in facts.names
    }
    return pd.DataFrame([{"configuration": name, **row} for name, row in rows.items()])


def _comparisons(facts: Facts) -> pd.DataFrame:
    fields = ["configuration", "metric", "n", "mean_difference", "low", "high", "t", "df", "p",
              "p_corrected", "cohens_d", "wilcoxon_p", "wilcoxon_floor", "reduction",
              "significant", "note"]  # fmt: skip
    rows = [
        {"configuration": name, "metric": metric, **facts.compare(name, metric)}
        for name in facts.others
        for metric in METRICS
        if facts.compare(name, metric)
    ]
    return pd.DataFrame(rows, columns=fields, dtype=object)


def _latex(results: Results, facts: Facts) -> bytes:
    losses = facts.quality.by_name
    rows = []
    for name in facts.names:
        row = {
            "Configuration": rf"\texttt{{{latex(name, 60)}}}",
            "Experts": _pm(facts, name, EXPERTS),
            r"Saved (\%)": _tex(number(100 * facts.compared(name, EXPERTS, "reduction"), 1)),
            "Time (s)": _pm(facts, name, SECONDS),
            "Tokens/s": _tex(number(facts.mean_of(name, SPEED), 1)),
            "CV": _tex(number(facts.mean_of(name, BALANCE), 2)),
        }
        if losses:
            ratio = losses[name].perplexity_ratio if name in losses else math.nan
            row[r"$\Delta$PPL (\%)"] = _tex(signed(100 * (ratio - 1), 1))
        rows.append(row)
    model = latex(results.run.get("model", {}).get("name", ""), 80)
    caption = f"BH routing against Top-K{' on ' + model if model else ''}: mean $\\pm$ standard "
    caption += f"deviation over {facts.num_prompts} prompts."
    table = pd.DataFrame(rows).to_latex(
        index=False, caption=caption, column_format="l" + "r" * (len(rows[0]) - 1 if rows else 0)
    )
    table = table.replace("\\caption", "\\centering\n\\caption", 1)
    return f"% needs \\usepackage{{booktabs}}\n{table}".encode()


def _pm(facts: Facts, name: str, metric: str) -> str:
    spread = number(facts.describe(name, metric).get("sd"))
    mean = _tex(number(facts.mean_of(name, metric)))
    return mean if mean == "--" else f"{mean} $\\pm$ {_tex(spread)}"


def _tex(shown: str) -> str:
    return f"${shown.replace('−', '-')}$" if shown[:1] in "−+" else shown.replace("–", "--")
