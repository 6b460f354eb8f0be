"""The commands: each parses, calls one function and prints.

What loads torch, pandas or matplotlib is imported inside: `--help` doesn't wait for it, and Ctrl-C
works in the seconds that it takes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bh_routing.cli import tables
from bh_routing.cli.console import console_log, interruptible
from bh_routing.cli.options import JsonOption, with_options
from bh_routing.errors import InputError
from bh_routing.experiments.specs import (
    CalibrateSpec,
    Choice,
    EvaluateSpec,
    LmEvalSpec,
    ModelSpec,
    PromptChoice,
    PruneSpec,
    RunSpec,
    SweepSpec,
    make_spec,
)

Values = dict[str, Any]
TrackOption = Annotated[
    str | None, typer.Option(help="Log the run to mlflow, wandb or tensorboard as well.")
]


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def _print(value: Any, as_json: bool, table: Callable[[Any], str]) -> None:
    _print_json(value) if as_json else typer.echo(table(value))


def _resumes(output: Path | None) -> str:
    if output is None:
        return "nothing was kept; with --output a stopped evaluation can be resumed"
    return f"the same command resumes from {output}"


@with_options(RunSpec, PromptChoice)
def run(
    context: typer.Context,
    values: Values,
    choice: Values,
    track: TrackOption = None,
    as_json: JsonOption = False,
) -> int:
    """Compare routing configurations on prompts; resumes where an earlier run stopped."""
    with console_log(), interruptible(_resumes(values["output"])):
        from bh_routing.analysis.results import load_results
        from bh_routing.analysis.trackers import find_tracker, track_run
        from bh_routing.experiments.configurations import choose
        from bh_routing.experiments.run import run as run_experiments
        from bh_routing.report.conclusion import conclude_run

        if track is not None:
            find_tracker(track)
        own = context.obj
        chosen = choose(PromptChoice(**choice), own.configs, own.prompts)
        conclude = partial(
            conclude_run, analyze=own.analyze, visualize=own.visualize, report=own.report
        )
        outcome = run_experiments(make_spec(RunSpec, **values, **chosen), conclude)
        if track is not None:
            results = outcome.concluded or load_results(outcome.folder)
            typer.echo(f"logged to {track_run(results, track)}", err=True)
    if as_json:
        _print_json(outcome.to_document())
    return outcome.exit_code


@with_options(CalibrateSpec)
def calibrate(
    context: typer.Context,
    values: Values,
    plots: Annotated[
        Path | None,
        typer.Option(help="Folder for diagnostic plots of each null distribution."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Fit reference distributions of a model's router scores; `run --calibration` takes them."""
    with console_log():
        from bh_routing.experiments.calibrating import calibrate_to_file
        from bh_routing.report.charts.calibration import plot_calibration

        spec = make_spec(CalibrateSpec, **values)
        fitted = calibrate_to_file(spec)
        pages = plot_calibration(spec.output, plots) if plots else []
    typer.echo(
        f"wrote {spec.output}: {fitted.num_tokens:,} tokens of {fitted.num_documents} documents, "
        f"nulls {', '.join(fitted.nulls)}",
        err=True,
    )
    if as_json:
        _print_json(
            {
                "file": str(spec.output),
                "fingerprint": fitted.fingerprint,
                "num_tokens": fitted.num_tokens,
                "num_documents": fitted.num_documents,
                "plots": [str(page) for page in pages],
                "smallest_alpha": {name: fitted.resolution(name) for name in fitted.nulls},
            }
        )
    return 0


@with_options(EvaluateSpec, Choice)
def evaluate(
    context: typer.Context, values: Values, choice: Values, as_json: JsonOption = False
) -> int:
    """Score configurations against the model's own top-k on the same tokens."""
    with console_log(), interruptible(_resumes(values["output"])):
        from bh_routing.analysis.quality import QualityOptions, analyze_quality
        from bh_routing.experiments.configurations import choose
        from bh_routing.experiments.evaluate import evaluate as score

        chosen = choose(Choice(**choice), context.obj.configs)
        spec = make_spec(EvaluateSpec, **values, **chosen)
        options = QualityOptions(seed=spec.seed)
        if spec.margin is not None:
            options = options._replace(margin=spec.margin)
        document = score(spec, lambda records: analyze_quality(records, options))
    _print(document, as_json, tables.quality)
    return 0


@with_options(SweepSpec)
def sweep(context: typer.Context, values: Values, as_json: JsonOption = False) -> int:
    """Compare rules at equal mean numbers of experts, tuned on calibration text only."""
    with console_log(), interruptible(_resumes(values["output"])):
        from bh_routing.analysis.quality import QualityOptions
        from bh_routing.experiments.experiment import Attempts
        from bh_routing.experiments.sweep import sweep as compare
        from bh_routing.report.sweep import conclude_sweep

        spec = make_spec(SweepSpec, **values, command=context.obj.command)
        document = compare(spec)
        options = QualityOptions(seed=spec.seed)
        attempt = Attempts()
        attempt("the conclusion", lambda: conclude_sweep(spec.output, options))
    for problem in attempt.problems:
        typer.echo(f"bh-routing: {problem}", err=True)
    if as_json:
        _print_json(document)
    return 1 if attempt.problems else 0


@with_options(PruneSpec)
def prune(
    context: typer.Context,
    values: Values,
    model: Annotated[str, typer.Argument(help="`demo`, a folder, or a Hugging Face id.")],
    as_json: JsonOption = False,
) -> int:
    """Write a checkpoint with fewer experts per layer, which transformers and vLLM load."""
    with console_log():
        from bh_routing.experiments.prune import prune as write_pruned

        made = write_pruned(make_spec(PruneSpec, model=model, **values))
    typer.echo(
        f"wrote {values['output']}: {made['keep']} of {made['num_experts']} experts in each of "
        f"{len(made['kept'])} layers, by {made['score']}",
        err=True,
    )
    if as_json:
        _print_json(made)
    return 0


@with_options(LmEvalSpec, Choice)
def lm_eval(
    context: typer.Context, values: Values, choice: Values, as_json: JsonOption = False
) -> int:
    """Run lm-eval tasks under each configuration; compare with the model's own top-k."""
    missing = [name for name in ("lm_eval", "accelerate", "datasets") if not find_spec(name)]
    if missing:
        raise InputError(
            f"the command lm-eval needs {', '.join(missing)}; run: "
            "pip install 'bh-routing[lm-eval]'"
        )
    with console_log():
        from bh_routing.analysis.task_outcomes import compare_tasks
        from bh_routing.experiments.configurations import choose
        from bh_routing.integrations.task_runs import evaluate_tasks

        chosen = choose(Choice(**choice), context.obj.configs)
        document = evaluate_tasks(make_spec(LmEvalSpec, **values, **chosen), compare_tasks)
    _print(document, as_json, tables.tasks)
    return 0


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folder of a run or sweep; several runs: compare them.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML report; default: report.html in the folder. Required to compare."),
    ] = None,
    format: Annotated[
        Literal["png", "pdf", "svg"], typer.Option(help="Format of the plots.")
    ] = "png",
    track: TrackOption = None,
) -> int:
    """Write report.html, REPORT.md and the plots of a run, SWEEP.md of a sweep, or compare runs."""
    from bh_routing.analysis.results import load_results
    from bh_routing.analysis.sweep_records import is_sweep
    from bh_routing.analysis.trackers import track_run
    from bh_routing.report.charts import draw_plots
    from bh_routing.report.facts import facts_of
    from bh_routing.report.markdown import write_report
    from bh_routing.report.page import write_comparison, write_page_of
    from bh_routing.report.sweep import conclude_sweep

    if len(folders) > 1:
        if output is None:
            raise InputError(
                f"a comparison of {len(folders)} folders needs a file to write; add "
                "--output, such as --output comparison.html"
            )
        typer.echo(f"wrote {write_comparison(folders, output)}", err=True)
        return 0
    if is_sweep(folders[0]):
        if output is not None or track is not None:
            raise InputError(
                f"{folders[0]} is a sweep: its report is SWEEP.md in that folder and isn't logged; "
                "leave out --output and --track"
            )
        for path in conclude_sweep(folders[0]):
            typer.echo(f"wrote {path}", err=True)
        return 0
    results = load_results(folders[0])
    facts = facts_of(results)
    written = [*draw_plots(facts, format), write_report(facts), write_page_of(facts, output)]
    for path in written:
        typer.echo(f"wrote {path}", err=True)
    if track is not None:
        typer.echo(f"logged to {track_run(results, track)}", err=True)
    return 0


def export(
    folder: Annotated[Path, typer.Argument(help="Folder that `bh-routing run` wrote.")],
    to: Annotated[Literal["xlsx", "latex", "json"], typer.Option(help="Format of the file.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: inside the folder.")
    ] = None,
) -> int:
    """Export the results of a run."""
    from bh_routing.report.export import export_results

    typer.echo(f"wrote {export_results(folder, to, output)}", err=True)
    return 0


def models(
    check: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Load this model (`demo`, a folder or a Hugging Face id), probe its routers and "
            "report the findings.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="With --check: auto, cuda or cpu.")] = "auto",
    no_fp16: Annotated[
        bool, typer.Option("--no-fp16", help="With --check: float32 in place of bfloat16.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """List the families of models that can be routed, or check one model."""
    with console_log():
        from bh_routing.models.families import family_rows, router_rows
        from bh_routing.models.load import load_model
        from bh_routing.models.routers import find_routers

        if check is None:
            rows = [dict(row) for row in family_rows()]
        else:
            spec = make_spec(
                ModelSpec, model=check, device=device, dtype="float32" if no_fp16 else "auto"
            )
            loaded = load_model(spec.model, device=spec.device, dtype=spec.dtype)
            rows = router_rows(find_routers(loaded.model).sites)
    _print(rows, as_json, tables.aligned)
    return 0


def doctor(
    output: Annotated[Path, typer.Option(help="Folder of future results; only checked.")] = Path(
        "results"
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
        _print_json(
            {
                "findings": [asdict(finding) for finding in findings],
                "statistics": rows,
            }
        )
    for finding in [] if as_json else findings:
        remedy = f": {finding.remedy}" if finding.remedy else ""
        typer.echo(f"{finding.state:<8} {finding.check:<12} {finding.text}{remedy}")
    return int(any(finding.state == "problem" for finding in findings))


def bench(
    part: Annotated[str, typer.Argument(help="decode, prefill or suite.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="`demo`, `olmoe-shape` (OLMoE-1B-7B's, random weights), a folder or a Hugging "
            "Face id. Default: olmoe-shape on CUDA, demo on a CPU."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    batches: Annotated[str, typer.Option(help="decode: batch sizes.")] = "1",
    lengths: Annotated[
        str | None,
        typer.Option(help="prefill: prompt lengths. Default: 16,128,1024,4096; on a CPU to 512."),
    ] = None,
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
        from bh_routing.experiments.bench import BenchSpec
        from bh_routing.experiments.bench import bench as measure

        spec = BenchSpec(
            part=part,  # type: ignore[arg-type]  # checked there
            model=model,
            device=device,
            batches=_numbers("batches", batches),
            lengths=_numbers("lengths", lengths) if lengths else (),
            tokens=tokens,
            rounds=rounds,
            is_compiled=compiled,
        )
        document = measure(spec)
    _print(document, as_json, tables.speeds)
    return 0


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"{name} must be numbers like 1,4,16, got {text!r}") from None
