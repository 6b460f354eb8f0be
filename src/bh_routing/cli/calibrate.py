"""`bh-routing calibrate`: fit a model's null distributions on text and save them to one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bh_routing.cli.console import console_log
from bh_routing.cli.options import DeviceOption, Float32Option, JsonOption, ModelOption
from bh_routing.errors import InputError
from bh_routing.experiments import defaults


def calibrate(
    output: Annotated[Path, typer.Option(help="File to write, such as model.safetensors.")],
    model: ModelOption = defaults.MODEL,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file; may be given several times. Default: the packaged text."),
    ] = None,
    nulls: Annotated[
        str,
        typer.Option(
            help="Null distributions to fit, separated by commas; `needed_by_loss` is bh_drop's, "
            "`needed` its part that needs no gradients."
        ),
    ] = "background",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of text to use.")
    ] = defaults.CALIBRATION_TOKENS,
    seed: Annotated[int, typer.Option(help="Seed of the sampling of scores.")] = defaults.SEED,
    plots: Annotated[
        Path | None,
        typer.Option(help="Folder for diagnostic plots of each null distribution."),
    ] = None,
    device: DeviceOption = defaults.DEVICE,
    no_fp16: Float32Option = False,
    as_json: JsonOption = False,
) -> int:
    """Fit reference distributions of a model's router scores; `run --calibration` takes them."""
    with console_log():
        from bh_routing.engine.calibrate import calibrate as fit
        from bh_routing.engine.texts import packaged_documents, read_documents
        from bh_routing.experiments.specs import make_spec
        from bh_routing.models.load import load_model
        from bh_routing.nulls.catalog import get_null
        from bh_routing.nulls.contributions import NEEDED
        from bh_routing.nulls.cut_offs import MIN_TOKENS
        from bh_routing.report.charts.calibration import plot_calibration

        if max_tokens < MIN_TOKENS:
            raise InputError(
                f"--max-tokens must be at least {MIN_TOKENS}, got {max_tokens}: no rule takes a "
                "calibration from fewer"
            )
        names = [name.strip() for name in nulls.split(",") if name.strip()]
        observed = NEEDED.values()
        names = [name for name in names if name in observed or get_null(name).needs_table]
        spec = make_spec(
            model=model, device=device, seed=seed, dtype="float32" if no_fp16 else defaults.DTYPE
        )
        documents = read_documents(text) if text else packaged_documents("calibration")
        loaded = load_model(spec.model, device=spec.device, dtype=spec.dtype)
        fitted = fit(
            loaded.model,
            loaded.tokenizer,
            [document.text for document in documents],
            nulls=names,
            max_tokens=max_tokens,
            seed=seed,
        )
        fitted.check_text()
        fitted.save(output)
        pages = plot_calibration(output, plots) if plots else []
    facts = {
        "file": str(output),
        "fingerprint": fitted.fingerprint,
        "num_tokens": fitted.num_tokens,
        "num_documents": fitted.num_documents,
        "plots": [str(page) for page in pages],
        "smallest_alpha": {name: fitted.resolution(name) for name in names},
    }
    typer.echo(
        f"wrote {output}: {fitted.num_tokens:,} tokens of {fitted.num_documents} documents, "
        f"nulls {', '.join(names)}",
        err=True,
    )
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    return 0
