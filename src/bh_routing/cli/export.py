"""`bh-routing export`: a run's results for spreadsheets, papers and programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """Formats of exported results."""

    XLSX = "xlsx"
    LATEX = "latex"
    JSON = "json"


def export(
    folder: Annotated[Path, typer.Argument(help="Folder that `bh-routing run` wrote.")],
    to: Annotated[Format, typer.Option(help="Format of the file.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: inside the folder.")
    ] = None,
) -> int:
    """Export the results of a run."""
    from bh_routing.report.export import export_results

    written = export_results(folder, to.value, output)
    typer.echo(f"wrote {written}", err=True)
    return 0
