"""`bh-routing run`: run every configuration on every prompt, then analyse, plot and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bh_routing.cli.conclusion_hooks import make_hooks
from bh_routing.cli.console import console_log, interruptible
from bh_routing.cli.options import (
    BatchSizeOption,
    BudgetOption,
    CalibrationOption,
    CalibrationTextOption,
    ChatTemplateOption,
    ConfigOption,
    ConfigsOption,
    DeviceMapOption,
    DeviceOption,
    ExecutorOption,
    Float32Option,
    JsonOption,
    ModelOption,
    RayAddressOption,
    SeedOption,
    Surroundings,
    WorkersOption,
)
from bh_routing.experiments import defaults

if TYPE_CHECKING:
    from bh_routing.experiments.config_file import Selection
    from bh_routing.experiments.run import RunOutcome


def run(
    context: typer.Context,
    model: ModelOption = defaults.MODEL,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path(defaults.OUTPUT),
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens generated per experiment.")
    ] = defaults.MAX_TOKENS,
    checkpoint_interval: Annotated[
        int, typer.Option(help="Finished experiments between two snapshots in checkpoints/.")
    ] = defaults.CHECKPOINT_INTERVAL,
    no_resume: Annotated[
        bool,
        typer.Option(
            "--no-resume", help="Move the folder's earlier run aside and start a new one."
        ),
    ] = False,
    device: DeviceOption = defaults.DEVICE,
    no_fp16: Float32Option = False,
    config: ConfigOption = None,
    configs: ConfigsOption = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Only these prompts: numbers from 1, ranges or categories: 1,4-6,simple."
        ),
    ] = None,
    calibration: CalibrationOption = None,
    calibration_text: CalibrationTextOption = None,
    seed: SeedOption = defaults.SEED,
    executor: ExecutorOption = defaults.EXECUTOR,
    eval_text: Annotated[
        Path | None, typer.Option(help="Text to score quality on instead of the packaged one.")
    ] = None,
    no_eval: Annotated[
        bool, typer.Option("--no-eval", help="Skip the scoring of quality.")
    ] = False,
    eval_tokens: Annotated[int, typer.Option(help="Most tokens scored.")] = defaults.EVAL_TOKENS,
    token_traces: Annotated[
        int, typer.Option(help="Prompts whose tokens report.html shows one by one; 0: none.")
    ] = defaults.TOKEN_TRACES,
    timing_rounds: Annotated[
        int, typer.Option(help="Rounds of interleaved timing of all configurations; 0: none.")
    ] = defaults.TIMING_ROUNDS,
    track: Annotated[
        str | None, typer.Option(help="Log the run to mlflow, wandb or tensorboard as well.")
    ] = None,
    budget: BudgetOption = None,
    device_map: DeviceMapOption = None,
    batch_size: BatchSizeOption = None,
    ray_address: RayAddressOption = None,
    workers: WorkersOption = None,
    chat_template: ChatTemplateOption = defaults.CHAT_TEMPLATE,
    as_json: JsonOption = False,
) -> int:
    """Compare routing configurations on prompts; resumes where an earlier run stopped."""
    surroundings = context.obj
    values: dict[str, Any] = {
        "model": model,
        "output": output,
        "max_tokens": max_tokens,
        "checkpoint_interval": checkpoint_interval,
        "resume": not no_resume,
        "device": device,
        "dtype": "float32" if no_fp16 else defaults.DTYPE,
        "budget": budget,
        "calibration": calibration,
        "calibration_text": calibration_text,
        "seed": seed,
        "device_map": device_map,
        "batch_size": batch_size,
        "executor": executor,
        "ray_address": ray_address,
        "workers": workers,
        "chat_template": chat_template,
        "eval_text": eval_text,
        "no_eval": no_eval,
        "eval_tokens": eval_tokens,
        "token_traces": token_traces,
        "timing_rounds": timing_rounds,
    }
    with console_log(), interruptible(f"the same command goes on with what {output} holds"):
        # Inside: importing torch takes seconds, in which Ctrl-C must work too.
        from bh_routing.experiments.run import run as run_experiments
        from bh_routing.experiments.specs import make_spec

        if track is not None:
            from bh_routing.analysis.trackers import find_tracker

            find_tracker(track)
        chosen = choose(surroundings, config, split_items(prompts))
        spec = make_spec(
            **values, configs=chosen.configs, only=split_items(configs), prompts=chosen.prompts
        )
        outcome = run_experiments(spec, make_hooks(surroundings))
        if track is not None:
            from bh_routing.analysis.trackers import track_run

            typer.echo(f"logged to {track_run(output, track)}", err=True)
    if as_json:
        _print_outcome(outcome)
    return outcome.exit_code


def split_items(text: str | None) -> list[str] | None:
    """Split a comma-separated option; None stays None."""
    if text is None:
        return None
    return [item.strip() for item in text.split(",") if item.strip()]


def choose(
    surroundings: Surroundings,
    config: Path | None,
    prompt_items: Sequence[str] | None,
) -> Selection:
    """Return the library's or the caller's configurations and prompts, with a file's appended.

    Prompts are selected here, configurations once the model is known.
    """
    from bh_routing.experiments.config_file import Selection, add_config_file
    from bh_routing.experiments.specs import select_prompts

    configs = surroundings.configs
    prompts = surroundings.prompts
    chosen = Selection(
        dict(defaults.ROUTING_CONFIGS if configs is None else configs),
        list(defaults.TEST_PROMPTS if prompts is None else prompts),
    )
    if config is not None:
        chosen = add_config_file(config, chosen.configs, chosen.prompts)
    return Selection(chosen.configs, select_prompts(chosen.prompts, prompt_items))


def _print_outcome(outcome: RunOutcome) -> None:
    experts: dict[str, list[float]] = {}
    for record in outcome.records:
        if record.status == "ok":
            experts.setdefault(record.config_name, []).append(record.avg_experts_per_token)
    content = {
        "folder": str(outcome.folder),
        "exit_code": outcome.exit_code,
        "experiments": len(outcome.records),
        "run_now": outcome.num_run,
        "reused": outcome.num_reused,
        "problems": list(outcome.problems),
        "mean_experts": {name: sum(means) / len(means) for name, means in experts.items()},
    }
    typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
