"""`bh-routing bench`: speed of decoding, prefill or a suite of experiments on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from bh_routing.cli.console import console_log
from bh_routing.cli.options import DeviceOption, JsonOption


def bench(
    part: Annotated[str, typer.Argument(help="decode, prefill or suite.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="`demo`, `olmoe-shape` (OLMoE-1B-7B's, random weights), a folder or a Hugging "
            "Face id. Default: olmoe-shape on CUDA, demo on a CPU."
        ),
    ] = None,
    device: DeviceOption = "auto",
    batches: Annotated[str, typer.Option(help="decode: batch sizes.")] = "1",
    tokens: Annotated[int, typer.Option(help="decode: tokens generated per sequence.")] = 200,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one warm-up round.")] = 5,
    compiled: Annotated[
        bool,
        typer.Option("--compiled", help="decode: also time transformers' compiled generation."),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Time one part alongside transformers' own implementation, in one run."""
    with console_log():
        from bh_routing.errors import InputError
        from bh_routing.experiments.bench import BenchSpec
        from bh_routing.experiments.bench import bench as measure

        try:
            sizes = tuple(int(size) for size in batches.split(","))
        except ValueError:
            raise InputError(f"batches must be numbers like 1,4,16, got {batches!r}") from None
        spec = BenchSpec(
            part=part,  # type: ignore[arg-type]  # checked there
            model=model,
            device=device,
            batches=sizes,
            tokens=tokens,
            rounds=rounds,
            is_compiled=compiled,
        )
        document = measure(spec)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return 0
    for key, value in document.items():
        if key != "rows":
            typer.echo(f"{key}: {_text(value)}")
    typer.echo(_table(document["rows"]))
    return 0


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
