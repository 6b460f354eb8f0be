"""Options common to several commands, and the overrides that `main` accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """Overrides for `main`; None stands for the library's own."""

    configs: dict[str, dict[str, Any]] | None = None
    """Name -> configuration."""
    prompts: list[dict[str, Any]] | None = None
    """Prompts as plain data."""
    analyze: Callable[[Any], dict[str, Any]] | None = None
    """Table of experiments -> summary."""
    visualize: Callable[[Any, Any], Any] | None = None
    """Table and folder -> plots."""
    report: Callable[[Any, dict[str, Any], Any], Any] | None = None
    """Table, summary and folder -> report."""
    command: str | None = None
    """The command line; set by `main`."""


ModelOption = Annotated[
    str, typer.Option(help="`demo`, a folder with a checkpoint, or a Hugging Face id.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cuda or cpu; auto is CUDA if available.")]
Float32Option = Annotated[
    bool,
    typer.Option("--no-fp16", help="float32 instead of bfloat16 on CUDA; needs twice the memory."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of all random draws.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout.")]
ConfigOption = Annotated[
    Path | None, typer.Option(help="YAML file with further configurations, and prompts for `run`.")
]
ConfigsOption = Annotated[
    str | None,
    typer.Option(
        help="Only these configurations, such as topk_8,bh_strict; lm-eval needs the model's own "
        "top-k among them."
    ),
]
CalibrationOption = Annotated[
    Path | None, typer.Option(help="File made by `bh-routing calibrate`.")
]
CalibrationTextOption = Annotated[
    Path | None, typer.Option(help="Text to calibrate on instead of the packaged one.")
]
TextOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Text or JSONL file, or hf:NAME:SPLIT; may be given several times. Default: the "
        "packaged evaluation text."
    ),
]
TokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="Most tokens scored, spread over the documents. Default: all."),
]
ChatTemplateOption = Annotated[
    str,
    typer.Option(
        help="Whether to apply the tokenizer's chat template to prompts, as user messages: on, "
        "off, or auto (on if it has one)."
    ),
]
ExecutorOption = Annotated[
    str,
    typer.Option(
        help="local is this process; ray is workers, here or on a cluster (docs/scaling.md)."
    ),
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(help="Ray cluster, such as auto or host:6379. Default: start Ray here."),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Ray workers. Default: as many as there is room for.")
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(help="auto spreads a model larger than one GPU over all GPUs, with accelerate."),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Windows scored per forward pass. Default: as many as memory bounds allow. "
        "Experiments and their times stay at batch size 1.",
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        min=1,
        help="Target mean experts per token of every rule but static top-k; its tuning parameter "
        "(alpha of bh) is found on the calibration text.",
    ),
]
