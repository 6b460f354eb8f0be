"""Export results to a spreadsheet, a paper or another program."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bh_routing.analysis.comparisons import analyze_results
from bh_routing.analysis.results import Results, load_results
from bh_routing.errors import InputError, unknown_name
from bh_routing.report.facts import BALANCE, EXPERTS, SECONDS, SPEED, Facts
from bh_routing.report.files import write_bytes
from bh_routing.report.table import experiments_of
from bh_routing.report.text import as_float, latex, number, signed, spreadsheet
from bh_routing.results.files import render_json
from bh_routing.results.records import SCHEMA_VERSION, column_definitions

ENDINGS: Final = {"xlsx": "xlsx", "latex": "tex", "json": "json"}
STEM: Final = "bh_routing_results"


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
    summary = results.summary or analyze_results(results.experiments)
    facts = Facts(
        table=experiments_of(results.experiments, results.timings),
        summary=summary,
        run=results.run,
        folder=results.folder,
    )
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
        return "".join(c for c in value if c in "\n\t" or not _is_control(c))
    if isinstance(value, Mapping):
        return {_visible(str(key)): _visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(item) for item in value]
    return value


def _is_control(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) < 160 or 0xD800 <= ord(character) < 0xE000


def _workbook(results: Results, facts: Facts) -> bytes:
    try:
        openpyxl = importlib.import_module("openpyxl")
    except ModuleNotFoundError:
        raise InputError(
            "the export to xlsx needs openpyxl, which isn't installed; run: pip install openpyxl"
        ) from None
    book = openpyxl.Workbook(write_only=True)
    header, rows = _means(facts)
    _sheet(book, "configurations", header, rows)
    header, rows = _comparisons(facts)
    _sheet(book, "comparisons", header, rows)
    frame = results.experiments
    _sheet(book, "experiments", list(frame.columns), frame.to_numpy(dtype=object).tolist())
    _sheet(book, "columns", ["column", "definition"], list(column_definitions().items()))
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def _sheet(book: Any, title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    sheet = book.create_sheet(title)
    sheet.freeze_panes = "A2"
    for number_, name in enumerate(header, start=1):
        letter = importlib.import_module("openpyxl.utils").get_column_letter(number_)
        sheet.column_dimensions[letter].width = min(max(len(str(name)) + 2, 12), 40)
    for row in [header, *rows]:
        sheet.append([_cell(value) for value in row])


def _cell(value: Any) -> float | int | str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return value if math.isfinite(value) else None
    return None if value is None else spreadsheet(value)


def _means(facts: Facts) -> tuple[list[str], list[list[Any]]]:
    header = ["configuration", "experiments", "experts", "experts_sd", "reduction_share",
              "seconds", "tokens_per_second", "load_cv", "load_cv_noise"]  # fmt: skip
    rows: list[list[Any]] = []
    for name in facts.names:
        rows.append(
            [
                name,
                len(facts.table.values(name, EXPERTS)),
                facts.table.mean(name, EXPERTS),
                as_float(facts.describe(name, EXPERTS).get("sd")),
                facts.compared(name, EXPERTS, "reduction"),
                facts.table.mean(name, SECONDS),
                facts.table.mean(name, SPEED),
                facts.table.mean(name, BALANCE),
                facts.table.mean(name, f"{BALANCE}_noise"),
            ]
        )
    return header, rows


def _comparisons(facts: Facts) -> tuple[list[str], list[list[Any]]]:
    fields = ["n", "mean_difference", "low", "high", "t", "df", "p", "p_corrected", "cohens_d",
              "wilcoxon_p", "wilcoxon_floor", "reduction", "significant", "note"]  # fmt: skip
    rows: list[list[Any]] = []
    for name in facts.others:
        for metric in (EXPERTS, SECONDS, SPEED, BALANCE):
            found = facts.compare(name, metric)
            if found:
                rows.append([name, metric, *(found.get(field) for field in fields)])
    return ["configuration", "metric", *fields], rows


def _latex(results: Results, facts: Facts) -> bytes:
    losses = facts.quality.by_name
    columns = ["Configuration", "Experts", r"Saved (\%)", "Time (s)", "Tokens/s", "CV"]
    columns += [r"$\Delta$PPL (\%)"] if losses else []
    lines = []
    for name in facts.names:
        cells = [
            rf"\texttt{{{latex(name, 60)}}}",
            _pm(facts, name, EXPERTS, 2),
            _tex(number(100 * facts.compared(name, EXPERTS, "reduction"), 1)),
            _pm(facts, name, SECONDS, 2),
            _tex(number(facts.table.mean(name, SPEED), 1)),
            _tex(number(facts.table.mean(name, BALANCE), 2)),
        ]
        if losses:
            ratio = losses[name].perplexity_ratio if name in losses else math.nan
            cells.append(_tex(signed(100 * (ratio - 1), 1)))
        lines.append(" & ".join(cells) + r" \\")
    model = latex(results.run.get("model", {}).get("name", ""), 80)
    caption = f"BH routing against Top-K{' on ' + model if model else ''}: mean $\\pm$ standard "
    caption += f"deviation over {facts.num_prompts} prompts."
    text = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{caption}}}",
        f"  \\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}",
        "    \\toprule",
        "    " + " & ".join(columns) + r" \\",
        "    \\midrule",
        *(f"    {line}" for line in lines),
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]
    return ("\n".join(text) + "\n").encode("utf-8")


def _pm(facts: Facts, name: str, metric: str, digits: int) -> str:
    spread = number(facts.describe(name, metric).get("sd"), digits)
    mean = _tex(number(facts.table.mean(name, metric), digits))
    return mean if mean == "--" else f"{mean} $\\pm$ {_tex(spread)}"


def _tex(shown: str) -> str:
    return f"${shown.replace('−', '-')}$" if shown[:1] in "−+" else shown.replace("–", "--")
