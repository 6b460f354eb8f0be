"""`bh-routing lm-eval`: lm-eval tasks under each configuration, compared item by item."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bh_routing.cli.console import console_log
from bh_routing.cli.options import (
    CalibrationOption,
    CalibrationTextOption,
    ChatTemplateOption,
    ConfigOption,
    ConfigsOption,
    DeviceOption,
    Float32Option,
    JsonOption,
    ModelOption,
    SeedOption,
)
from bh_routing.cli.run import choose, split_items
from bh_routing.errors import InputError, ResultsError
from bh_routing.experiments import defaults
from bh_routing.results.records import SCHEMA_VERSION, TASK_OUTCOMES, TASK_SUMMARY

if TYPE_CHECKING:
    from bh_routing.experiments.specs import NamedRule, RunSpec
    from bh_routing.integrations.task_runs import TaskPlan, TaskRun


def lm_eval(
    context: typer.Context,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, groups or tags of lm-eval, separated by commas. Local ones: bh_cloze, "
            "bh_choice, bh_rolling."
        ),
    ] = "bh_cloze,bh_choice,bh_rolling",
    model: ModelOption = defaults.MODEL,
    include_path: Annotated[
        list[Path] | None,
        typer.Option(help="Folder with further tasks; may be given several times."),
    ] = None,
    config: ConfigOption = None,
    configs: ConfigsOption = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Items of each task. Default: all.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in each prompt. Default: the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per forward pass.")] = 8,
    calibration: CalibrationOption = None,
    calibration_text: CalibrationTextOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for every item's outcome and the comparisons.")
    ] = None,
    device: DeviceOption = defaults.DEVICE,
    no_fp16: Float32Option = False,
    seed: SeedOption = defaults.SEED,
    chat_template: ChatTemplateOption = defaults.CHAT_TEMPLATE,
    as_json: JsonOption = False,
) -> int:
    """Run lm-eval tasks under each configuration; compare with the model's own top-k."""
    _require_extra()
    with console_log():
        from bh_routing.experiments.specs import make_spec
        from bh_routing.integrations.task_runs import TaskPlan

        spec = make_spec(
            model=model,
            device=device,
            dtype="float32" if no_fp16 else defaults.DTYPE,
            configs=choose(context.obj, config, None).configs,
            only=split_items(configs),
            calibration=calibration,
            calibration_text=calibration_text,
            seed=seed,
            chat_template=chat_template,
        )
        plan = TaskPlan(
            tasks=split_items(tasks) or (),
            include_paths=include_path or (),
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
        )
        document = _run(spec, plan, output)
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False) if as_json else _table(document))
    return 0


def _require_extra() -> None:
    missing = [name for name in ("lm_eval", "accelerate", "datasets") if not find_spec(name)]
    if missing:
        raise InputError(
            f"the command lm-eval needs {', '.join(missing)}; run: "
            "pip install 'bh-routing[lm-eval]'"
        )


def _run(spec: RunSpec, plan: TaskPlan, output: Path | None) -> dict[str, Any]:
    """Run all tasks, write outcomes as they arrive, and return the summary as plain data."""
    from bh_routing.analysis.task_outcomes import compare_tasks
    from bh_routing.engine.generate import choose_chat_template
    from bh_routing.experiments.calibrating import obtain_calibration
    from bh_routing.experiments.fitting import fit_to_config, fit_to_loaded
    from bh_routing.experiments.identity import collect_provenance
    from bh_routing.experiments.specs import make_rules, resolved
    from bh_routing.integrations.lm_eval import check_end_token
    from bh_routing.integrations.task_runs import find_tasks, run_tasks
    from bh_routing.models.load import load_model
    from bh_routing.models.routers import describe_model
    from bh_routing.results.files import render_json, to_strict, write_atomically

    _check_output(output)
    known = find_tasks(plan)
    fitted = fit_to_config(spec)
    loaded = load_model(spec.model, device=spec.device, dtype=spec.dtype)
    check_end_token(loaded.tokenizer)
    loaded = loaded._replace(tokenizer=choose_chat_template(loaded.tokenizer, spec.chat_template))
    facts = describe_model(loaded.model)
    spec, left_out = fit_to_loaded(fitted, loaded.model)
    rules = make_rules(spec.configs)
    reference = _reference(rules, facts.model_top_k)
    calibration = obtain_calibration(spec, rules, loaded.model, loaded.tokenizer)
    runs = []
    by_name = {named.name: named.rule for named in rules}
    for run in run_tasks(loaded, by_name, calibration.calibration, plan, known):
        runs.append(run)
        _append(output, run)
    comparisons = compare_tasks([o for run in runs for o in run.outcomes], reference)
    document: dict[str, Any] = to_strict(
        {
            "model": {"name": spec.model, **asdict(facts)},
            "configs": resolved(spec, rules)["configs"],
            "left_out": left_out,
            "reference": reference,
            "calibration": calibration.document,
            "tasks": list(plan.tasks),
            "limit": plan.limit,
            "num_fewshot": plan.num_fewshot,
            "batch_size": plan.batch_size,
            "chat_template": loaded.tokenizer.chat_template,
            "runs": [_run_facts(run) for run in runs],
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "provenance": {
                **collect_provenance(spec.seed),
                "lm_eval": metadata.version("lm_eval"),
            },
        }
    )
    if output is not None:
        write_atomically(output / TASK_SUMMARY, render_json(document))
    return document


def _reference(rules: list[NamedRule], model_top_k: int) -> str:
    from bh_routing.rules.fixed import TopK

    own = [named.name for named in rules if named.rule == TopK(model_top_k)]
    if not own:
        raise InputError(
            f"none of {', '.join(named.name for named in rules)} is the model's own top-k "
            f"(k = {model_top_k}), with which the others are compared; add such a configuration "
            "to --configs"
        )
    return own[0]


def _check_output(output: Path | None) -> None:
    """Raise ResultsError if the folder has outcomes, which mustn't be mixed with this run's."""
    for name in (TASK_OUTCOMES, TASK_SUMMARY):
        if output is not None and (output / name).exists():
            raise ResultsError(
                f"{output / name} is there already; give another --output, or move it away"
            )


def _append(output: Path | None, run: TaskRun) -> None:
    """Write a finished run's outcomes at once, so that an interruption doesn't lose them."""
    from bh_routing.results.files import render_json_lines

    if output is None:
        return
    output.mkdir(parents=True, exist_ok=True)
    with (output / TASK_OUTCOMES).open("ab") as file:
        file.write(
            render_json_lines(
                {"schema_version": SCHEMA_VERSION, **asdict(outcome)} for outcome in run.outcomes
            )
        )


def _run_facts(run: TaskRun) -> dict[str, Any]:
    return {
        "config_name": run.config_name,
        "requested": run.requested,
        "mean_experts": run.expert_use.mean_experts,
        "tokens": run.expert_use.tokens,
        "seconds": round(run.seconds, 2),
        "scores": [asdict(score) for score in run.scores],
    }


def _table(document: dict[str, Any]) -> str:
    """Return one block per metric of a task: experts, score, and change of score."""
    comparisons = {
        (c["task"], c["filter"], c["metric"], c["config_name"]): c for c in document["comparisons"]
    }
    blocks: dict[tuple[str, str, str], list[str]] = {}
    notes: dict[str, None] = {}
    width = max(13, *(len(name) for name in document["configs"]))
    for run in document["runs"]:
        for score in run["scores"]:
            key = (score["task"], score["filter"], score["metric"])
            found = comparisons.get((*key, run["config_name"]))
            block = blocks.setdefault(key, [_header(score, width)])
            block.append(_row(run, score, found, width))
            if found and found["note"]:
                notes[f"{score['task']}: {found['note']}"] = None
    lines = [line for block in blocks.values() for line in [*block, ""]]
    lines.append(
        f"Differences from {document['reference']} with 95 % intervals, item by item; of a "
        "perplexity or of bits per byte, the difference in log-likelihood, nats an item, word or "
        "byte. p: exact McNemar where answers are right or wrong, corrected by Holm over "
        "configurations. Experts: mean over real tokens and layers of the task's forward passes."
    )
    return "\n".join([*lines, *notes])


def _header(score: dict[str, Any], width: int) -> str:
    title = f"{score['task']} {score['metric']}"
    suffix = "" if score["filter"] == "none" else f", filter {score['filter']}"
    return (
        f"{title}{suffix}, {score['num_items']} items\n"
        f"  {'configuration':{width}}  experts      score   difference (95 % interval)"
        "       gained  lost  p (Holm)"
    )


def _row(
    run: dict[str, Any], score: dict[str, Any], found: dict[str, Any] | None, width: int
) -> str:
    start = (
        f"  {run['config_name']:{width}}  {_number(run['mean_experts'], '7.2f')}  "
        f"{score['value']:9.4f}"
    )
    if found is None:
        return start
    interval = f"({_number(found['low'], '+.4f')} to {_number(found['high'], '+.4f')})"
    return (
        f"{start}   {_number(found['difference'], '+.4f')} {interval:20}"
        f"  {_number(found['gained'], '6d'):>6} {_number(found['lost'], '5d'):>5}"
        f"  {_p(found['p_corrected']):>8}"
    )


def _p(value: float | None) -> str:
    return "<0.0001" if value is not None and value < 0.0001 else _number(value, ".4f")


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)
