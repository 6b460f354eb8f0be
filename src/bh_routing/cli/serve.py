"""The command that starts a server; its options that aren't ours are vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bh_routing.cli.console import console_log


def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="`demo`, a folder with a checkpoint, or a Hugging Face id.")
    ],
    rule: Annotated[str, typer.Option(help="Rule in one word, such as bh:alpha=0.05.")],
    calibration: Annotated[
        Path | None, typer.Option(help="File made by `bh-routing calibrate`, if the rule needs it.")
    ] = None,
    prefill_rule: Annotated[
        str | None,
        typer.Option(
            help="Rule of prompt tokens, for a rule that decides by decode step. Default: the "
            "model's own top-k."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check, and print what would be started.")
    ] = False,
) -> int:
    """Start `vllm serve` under a rule; all other options are passed to vLLM."""
    with console_log():
        from bh_routing.serving.launch import prepare, start

        launch = prepare(model, rule, calibration, prefill_rule, context.args)
    typer.echo(launch.describe(), err=not check)
    if not check:
        start(launch)
    return 0
