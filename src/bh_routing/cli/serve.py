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
    rule: Annotated[
        str | None, typer.Option(help="Rule in one word, such as bh:alpha=0.05.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of configurations, or the sweep.json of a sweep."),
    ] = None,
    configs: Annotated[
        str | None, typer.Option(help="Name of one configuration in the file of --config.")
    ] = None,
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
        from bh_routing.serving.launch import choose_rule, prepare, start

        chosen = choose_rule(rule, config, configs)
        launch = prepare(model, chosen, calibration, prefill_rule, context.args)
    typer.echo(launch.describe(), err=not check)
    if not check:
        start(launch)
    return 0
