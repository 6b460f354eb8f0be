"""Log a finished run to MLflow, Weights & Biases or TensorBoard."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import pandas as pd

from bh_routing.analysis.results import Results
from bh_routing.errors import InputError
from bh_routing.results.records import PLOTS, STATUS_OK

PACKAGES: Final = {"mlflow": "mlflow", "wandb": "wandb", "tensorboard": "tensorboardX"}
"""Tracker -> required package."""
PROJECT: Final = "bh-routing"
PARAMETER_LIMIT: Final = 500
"""Characters of a parameter; trackers reject longer ones."""
MEASURES: Final = [
    "avg_experts_per_token", "tokens_per_sec", "inference_time_sec", "expert_utilization_cv",
]  # fmt: skip
QUALITY: Final = ["delta_nll", "perplexity_ratio", "kl_mean", "mean_experts", "same_top1_share"]


def track_run(results: Results, tracker: str) -> str:
    """Log a results folder to a tracker: settings, numbers, plots and files.

    Args:
        results: contents of the output folder of `bh-routing run`.
        tracker: mlflow, wandb or tensorboard; configure the destination in the tracker, such as by
            MLFLOW_TRACKING_URI or WANDB_MODE. TensorBoard's events are written to the folder.
    Returns:
        The destination, for display.
    Raises:
        InputError: the tracker is unknown or not installed, or logging fails.
    """
    module = find_tracker(tracker)
    log = {"mlflow": _to_mlflow, "wandb": _to_wandb, "tensorboard": _to_tensorboard}[tracker]
    files = [path for path in sorted(results.folder.rglob("*")) if path.name != ".lock"]
    files = [path for path in files if path.is_file() and not path.is_symlink()]
    try:
        return log(module, results.folder, _parameters(results.run), _metrics(results), files)
    except Exception as error:  # trackers raise exceptions of any type
        raise InputError(
            f"logging to {tracker} failed ({_reason(error)}); the results are kept, run: "
            f"track_run(load_results({str(results.folder)!r}), {tracker!r})"
        ) from error


def find_tracker(tracker: str) -> ModuleType:
    """Import a tracker's package; call it before a long run.

    Raises:
        InputError: the tracker is unknown or not installed, or its store can't be used.
    """
    if tracker not in PACKAGES:
        raise InputError(f"tracker must be one of {', '.join(PACKAGES)}; got {tracker!r}")
    try:
        module = importlib.import_module(PACKAGES[tracker])
    except ImportError as error:
        raise InputError(
            f"tracker {tracker!r} needs the package {PACKAGES[tracker]}; "
            f"install it with: pip install 'bh-routing[{tracker}]'"
        ) from error
    if tracker == "mlflow":
        try:  # mlflow-skinny alone can't open MLflow's default store, SQLite
            module.search_experiments(max_results=1)
        except Exception as error:  # stores raise exceptions of any type
            raise InputError(
                f"MLflow can't use its store {module.get_tracking_uri()} ({_reason(error)}); set "
                "MLFLOW_TRACKING_URI to a server, or install the package mlflow for a local store"
            ) from error
    return module


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _parameters(run: Mapping[str, Any]) -> dict[str, str]:
    """Map the dotted path of every setting to its text."""
    parts = {part: run.get(part) for part in ("spec", "model", "provenance")}
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in pd.json_normalize(parts).to_dict("records")[0].items()
    }
    return {
        str(name): text if len(text) <= PARAMETER_LIMIT else text[: PARAMETER_LIMIT - 1] + "…"
        for name, text in texts.items()
    }


def _metrics(results: Results) -> dict[str, float]:
    """Map `configuration/measure` to its mean, where it is finite."""
    finished = results.experiments[results.experiments["status"] == STATUS_OK]
    scored = ((results.summary or {}).get("quality") or {}).get("rules", [])
    tables = (
        finished.groupby("config_name", sort=False)[MEASURES].mean(),
        pd.DataFrame(scored, columns=["config_name", *QUALITY]).set_index("config_name"),
    )
    return {
        f"{name}/{measure}": float(value)
        for table in tables
        for name, row in table.astype(float).iterrows()
        for measure, value in row.items()
        if math.isfinite(value)
    }


def _is_plot(path: Path) -> bool:
    return path.parent.name == PLOTS and path.suffix == ".png"


def _to_mlflow(
    mlflow: ModuleType, folder: Path, parameters: Mapping[str, str],
    metrics: Mapping[str, float], files: Sequence[Path],
) -> str:  # fmt: skip
    def allowed(values: Mapping[str, Any]) -> dict[str, Any]:
        """Replace characters that MLflow doesn't allow in names."""
        names = (name.replace("@", "_at_").replace("+", "_plus_") for name in values)
        return dict(zip(names, values.values(), strict=True))

    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=folder.resolve().name) as started:
        mlflow.log_params(allowed(parameters))
        mlflow.log_metrics(allowed(metrics))
        for path in files:
            inside = path.relative_to(folder).parent.as_posix()
            mlflow.log_artifact(str(path), None if inside == "." else inside)
        return f"MLflow run {started.info.run_id}"


def _to_wandb(
    wandb: ModuleType, folder: Path, parameters: Mapping[str, str],
    metrics: Mapping[str, float], files: Sequence[Path],
) -> str:  # fmt: skip
    name = folder.resolve().name
    with wandb.init(project=PROJECT, name=name, config=dict(parameters)) as started:
        plots = {path.stem: wandb.Image(str(path)) for path in files if _is_plot(path)}
        started.log({**metrics, **plots})  # one step
        artifact = wandb.Artifact("results", type="results")
        for path in files:
            if not _is_plot(path):
                artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
        started.log_artifact(artifact)
        return f"W&B run {started.id}"


def _to_tensorboard(
    tensorboard: ModuleType, folder: Path, parameters: Mapping[str, str],
    metrics: Mapping[str, float], files: Sequence[Path],
) -> str:  # fmt: skip
    from matplotlib.image import imread

    events = folder / "tensorboard"
    with tensorboard.SummaryWriter(str(events)) as writer:
        table = "\n".join(f"    {name}: {value}" for name, value in parameters.items())
        writer.add_text("parameters", table)
        for name, value in metrics.items():
            writer.add_scalar(name, value)
        for path in filter(_is_plot, files):
            writer.add_image(path.stem, imread(path)[..., :3], dataformats="HWC")
    return str(events)
