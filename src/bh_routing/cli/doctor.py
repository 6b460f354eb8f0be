"""`bh-routing doctor`: check this installation and name remedies."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bh_routing.cli.console import console_log
from bh_routing.cli.options import JsonOption
from bh_routing.experiments import defaults


def doctor(
    output: Annotated[Path, typer.Option(help="Folder of future results; only checked.")] = Path(
        defaults.OUTPUT
    ),
    statistics: Annotated[
        bool,
        typer.Option("--statistics", help="Also measure BH's false discovery rate, in seconds."),
    ] = False,
    tokens: Annotated[
        int, typer.Option(min=100, help="Synthetic tokens that --statistics draws.")
    ] = 2_000,
    as_json: JsonOption = False,
) -> int:
    """Check versions, devices, memory, demo model, hub and disk; exit 1 if a run can't work."""
    with console_log():
        from bh_routing.experiments.doctor import check_statistics, examine

        findings = examine(output)
        rows, measured = check_statistics(tokens) if statistics else ([], [])
    findings += measured
    if as_json:
        document = {
            "findings": [asdict(finding) for finding in findings],
            "statistics": [asdict(row) for row in rows],
        }
        typer.echo(json.dumps(document, ensure_ascii=False, indent=2))
    for finding in [] if as_json else findings:
        remedy = f": {finding.remedy}" if finding.remedy else ""
        typer.echo(f"{finding.state:<8} {finding.check:<12} {finding.text}{remedy}")
    return int(any(finding.state == "problem" for finding in findings))
