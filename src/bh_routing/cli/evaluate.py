"""`bh-routing evaluate`: loss of quality per rule, on text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bh_routing.cli.console import console_log, interruptible
from bh_routing.cli.options import (
    BatchSizeOption,
    BudgetOption,
    CalibrationOption,
    CalibrationTextOption,
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
    TextOption,
    TokensOption,
    WorkersOption,
)
from bh_routing.cli.run import choose, split_items
from bh_routing.experiments import defaults

if TYPE_CHECKING:
    from bh_routing.cli.options import Surroundings
    from bh_routing.experiments.evaluate import Evaluation


def evaluate(
    context: typer.Context,
    model: ModelOption = defaults.MODEL,
    text: TextOption = None,
    config: ConfigOption = None,
    configs: ConfigsOption = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            help="A rule in one word, such as bh:alpha=0.02,max_k=6; may be given several times. "
            "Without --config and --configs only these are scored."
        ),
    ] = None,
    tokens: TokensOption = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Input tokens per forward pass. Default: context, up to 1024."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Scored tokens of each window. Default: the window (disjoint)."),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Non-inferiority margin in nats per token. Default: ln 1.01."),
    ] = None,
    calibration: CalibrationOption = None,
    calibration_text: CalibrationTextOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for quality.csv, quality.json and every document's record."),
    ] = None,
    device: DeviceOption = defaults.DEVICE,
    no_fp16: Float32Option = False,
    seed: SeedOption = defaults.SEED,
    budget: BudgetOption = None,
    device_map: DeviceMapOption = None,
    batch_size: BatchSizeOption = None,
    executor: ExecutorOption = defaults.EXECUTOR,
    ray_address: RayAddressOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> int:
    """Score configurations against the model's own top-k on the same tokens."""
    with console_log(), interruptible(_way_on(output)):
        # Inside: importing torch takes seconds, in which Ctrl-C must work too.
        from bh_routing.analysis.quality import QualityOptions, analyze_quality
        from bh_routing.experiments.evaluate import EvaluateOptions
        from bh_routing.experiments.evaluate import evaluate as run_evaluation
        from bh_routing.experiments.specs import make_spec

        options = QualityOptions(seed=seed) if margin is None else QualityOptions(margin, seed=seed)
        spec = make_spec(
            model=model,
            device=device,
            dtype="float32" if no_fp16 else defaults.DTYPE,
            **_configs(context.obj, config, configs, rule),
            budget=budget,
            calibration=calibration,
            calibration_text=calibration_text,
            seed=seed,
            device_map=device_map,
            batch_size=batch_size,
            executor=executor,
            ray_address=ray_address,
            workers=workers,
        )
        found = run_evaluation(
            spec,
            EvaluateOptions(
                texts=text or (), max_tokens=tokens, window=window, stride=stride, output=output
            ),
        )
        document = _facts(model, found) | analyze_quality(found.records, options)
        if output is not None:
            _write(output, document)
    typer.echo(json.dumps(document, indent=2) if as_json else _table(document))
    return 0


def _way_on(output: Path | None) -> str:
    if output is None:
        return "nothing was kept; with --output a stopped evaluation can go on"
    return f"the same command goes on with what {output} holds"


def _configs(
    surroundings: Surroundings, config: Path | None, names: str | None, rules: list[str] | None
) -> dict[str, Any]:
    """Return fields of the spec: the configurations, and the names of those to run."""
    from bh_routing.experiments.config_file import parse_rule

    written = dict(parse_rule(text) for text in rules or [])
    if written and config is None and names is None:
        return {"configs": written}
    only = split_items(names)
    return {
        "configs": choose(surroundings, config, None).configs | written,
        "only": None if only is None else [*only, *written],
    }


def _facts(model: str, found: Evaluation) -> dict[str, Any]:
    return {
        "model": model,
        "model_fingerprint": found.facts.fingerprint,
        "dtype": found.facts.dtype,
        "device": found.facts.device,
        "left_out": found.left_out,
        "text_sha256": found.text.sha256,
        "window": found.text.window,
        "stride": found.text.stride,
        "calibration_tokens": found.calibration_tokens,
        "seconds": round(found.seconds, 2),
    }


def _write(folder: Path, document: dict[str, Any]) -> None:
    from bh_routing.results.files import render_csv, render_json, write_atomically

    write_atomically(folder / "quality.json", render_json(document))
    flat = [
        {name: value for name, value in row.items() if not isinstance(value, dict | list)}
        for row in document["rules"]
    ]
    write_atomically(folder / "quality.csv", render_csv(flat))


def _table(document: dict[str, Any]) -> str:
    """Return the terminal's table: experts and loss of quality per configuration."""
    rows = document["rules"]
    width = max(len(row["config_name"]) for row in rows)
    lines = [
        f"{'configuration':{max(width, 13)}}  experts   ΔNLL (95 % interval)        "
        "perplexity   KL mean    p99   same top-1   verdict"
    ]
    for row in rows:
        lines.append(
            f"{row['config_name']:{max(width, 13)}}  {_number(row['mean_experts'], '7.2f')}  "
            f"{_number(row['delta_nll'], '+8.4f')} ({_number(row['delta_nll_low'], '+.4f')} to "
            f"{_number(row['delta_nll_high'], '+.4f')})  "
            f"{_percent(row['perplexity_ratio'])}  {_number(row['kl_mean'], '8.4f')} "
            f"{_number(row['kl_p99'], '6.3f')}   {_number(row['same_top1_share'], '10.1%')}   "
            f"{row['verdict']}"
        )
    first = rows[0]
    lines.append(
        f"{first['tokens']:,} tokens of {first['documents']} documents in {first['clusters']} "
        f"clusters; windows of {document['window']}, stride {document['stride']}; a document's "
        "first token is scored after an end-of-text token. ΔNLL in nats a token against the "
        f"model's own top-k; margin {document['margin']:.4f}."
    )
    lines += document["notes"]
    lines += [f"{row['config_name']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _percent(ratio: float | None) -> str:
    return "       n/a" if ratio is None else f"{100 * (ratio - 1):+9.2f} %"
