"""`bh-routing report`: make the HTML report, REPORT.md and plots of finished results again."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bh_routing.errors import InputError


class Format(StrEnum):
    """Formats of plots."""

    PNG = "png"
    PDF = "pdf"
    SVG = "svg"


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folder that `bh-routing run` wrote; several: compare.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML report; default: report.html in the folder. Required to compare."),
    ] = None,
    format: Annotated[Format, typer.Option(help="Format of the plots.")] = Format.PNG,
    track: Annotated[
        str | None, typer.Option(help="Log the run to mlflow, wandb or tensorboard as well.")
    ] = None,
) -> int:
    """Write report.html, REPORT.md and the plots of a run, or compare several runs."""
    if len(folders) > 1:
        from bh_routing.report.page.compare import write_comparison

        if output is None:
            raise InputError(
                f"a comparison of {len(folders)} folders belongs to none of them; name the page "
                "with --output, such as --output comparison.html"
            )
        typer.echo(f"wrote {write_comparison(folders, output)}", err=True)
        return 0
    from bh_routing.analysis.results import load_results
    from bh_routing.report.facts import facts_of
    from bh_routing.report.figures import draw_plots
    from bh_routing.report.markdown import write_report
    from bh_routing.report.page.page import write_page_of

    results = load_results(folders[0])
    folder, facts = results.folder, facts_of(results)
    written = [*draw_plots(facts, format.value), write_report(facts)]
    written.append(write_page_of(facts, output))
    for path in written:
        typer.echo(f"wrote {path}", err=True)
    if track is not None:
        from bh_routing.analysis.trackers import track_run

        typer.echo(f"logged to {track_run(folder, track)}", err=True)
    return 0
