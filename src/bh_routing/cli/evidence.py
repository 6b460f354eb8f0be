"""The command that runs the protocol of docs/evidence.md on a model."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from bh_routing.cli.console import console_log, interruptible
from bh_routing.cli.options import JsonOption, with_options
from bh_routing.experiments.evidence import EvidenceSpec, describe_estimate
from bh_routing.experiments.evidence import evidence as run_protocol
from bh_routing.experiments.specs import make_spec
from bh_routing.results.records import CALIBRATION_PART


@with_options(EvidenceSpec)
def evidence(
    context: typer.Context,
    values: dict[str, Any],
    model: Annotated[str, typer.Argument(help="`demo`, a folder, or a Hugging Face id.")],
    as_json: JsonOption = False,
) -> int:
    """Run the whole protocol of comparisons on one model, and write one page, EVIDENCE.md."""
    remedy = f"the same command resumes from {values['output']}"
    with console_log(), interruptible(remedy):
        from bh_routing.report.evidence import conclude_evidence

        spec = make_spec(EvidenceSpec, model=model, **values)
        done = run_protocol(spec, run_part, conclude_evidence)
    if as_json:
        typer.echo(json.dumps(done, ensure_ascii=False, indent=2))
    elif spec.estimate and done["estimate"]:
        parts = (CALIBRATION_PART, *spec.parts)
        typer.echo(describe_estimate(done["estimate"], parts, spec.jobs))
    return int(any(outcome.get("reason") is not None for outcome in done["parts"].values()))


def run_part(spec: EvidenceSpec, part: str) -> None:
    """Carry out one part and its conclusion, in a process of its own."""
    from bh_routing.analysis.quality import QualityOptions, analyze_quality
    from bh_routing.analysis.sweep_records import is_sweep
    from bh_routing.experiments.evidence_parts import run_part as carry_out
    from bh_routing.report.sweep import conclude_sweep

    options = QualityOptions(seed=spec.seed)
    carry_out(spec, part, lambda records: analyze_quality(records, options))
    if is_sweep(spec.output / part):
        conclude_sweep(spec.output / part, options)
