"""`bh-routing sweep`: compare the perplexity of rules at equal mean numbers of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bh_routing.cli.conclusion_hooks import conclude_sweep
from bh_routing.cli.console import console_log, interruptible
from bh_routing.cli.options import (
    BatchSizeOption,
    CalibrationOption,
    CalibrationTextOption,
    DeviceMapOption,
    DeviceOption,
    ExecutorOption,
    Float32Option,
    JsonOption,
    ModelOption,
    RayAddressOption,
    SeedOption,
    TextOption,
    TokensOption,
    WorkersOption,
)
from bh_routing.errors import InputError
from bh_routing.experiments import defaults


def sweep(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder of the results; the same command resumes.")],
    model: ModelOption = defaults.MODEL,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Mean experts per token to compare at, separated by commas. Default: 6,5,4,3 of a "
            "model that uses 8, and the same fractions of another k."
        ),
    ] = None,
    rules: Annotated[
        list[str] | None,
        typer.Option(
            help="Rules without their tuning parameter, such as bh,bh_drop:scope=block,top_p; may "
            "be given several times. Static top-k is always there. contribution_threshold is "
            "population BH too: at equal cost both make the same decisions. Default: nine rules."
        ),
    ] = None,
    text: TextOption = None,
    tokens: TokensOption = None,
    calibration: CalibrationOption = None,
    calibration_text: CalibrationTextOption = None,
    device: DeviceOption = defaults.DEVICE,
    no_fp16: Float32Option = False,
    seed: SeedOption = defaults.SEED,
    device_map: DeviceMapOption = None,
    batch_size: BatchSizeOption = None,
    executor: ExecutorOption = defaults.EXECUTOR,
    ray_address: RayAddressOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> int:
    """Compare rules at equal mean numbers of experts, tuned on calibration text only."""
    with console_log(), interruptible(f"the same command goes on with what {output} holds"):
        # Inside: importing torch takes seconds, in which Ctrl-C must work too.
        from bh_routing.experiments.specs import make_spec
        from bh_routing.experiments.sweep import SweepOptions
        from bh_routing.experiments.sweep import sweep as run_sweep
        from bh_routing.experiments.variants import DEFAULT_VARIANTS, parse_variants

        options = SweepOptions(
            variants=parse_variants(rules or DEFAULT_VARIANTS),
            budgets=() if budgets is None else _budgets(budgets),
            texts=text or (),
            max_tokens=tokens,
            command=context.obj.command,
        )
        spec = make_spec(
            model=model,
            output=output,
            device=device,
            dtype="float32" if no_fp16 else defaults.DTYPE,
            calibration=calibration,
            calibration_text=calibration_text,
            seed=seed,
            device_map=device_map,
            batch_size=batch_size,
            executor=executor,
            ray_address=ray_address,
            workers=workers,
        )
        document = run_sweep(spec, options)
        problems = conclude_sweep(output, seed)
    for problem in problems:
        typer.echo(f"bh-routing: {problem}", err=True)
    if as_json:
        typer.echo(json.dumps(document, ensure_ascii=False, indent=2))
    return 1 if problems else 0


def _budgets(text: str) -> list[float]:
    try:
        budgets = [float(item) for item in text.split(",") if item.strip()]
    except ValueError:
        budgets = []
    if not budgets:
        raise InputError(f"budgets must be numbers separated by commas, got {text!r}; such as 5,4")
    return list(dict.fromkeys(budgets))
