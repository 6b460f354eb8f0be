"""Log a finished run to MLflow, Weights & Biases or TensorBoard."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from bh_routing.analysis.results import Results
from bh_routing.errors import InputError
from bh_routing.results.records import PLOTS, STATUS_OK


def flatten(prefix: str, value: Any) -> dict[str, Any]:
    """Map the dotted path of every leaf to its value.

    Example:
        >>> flatten("spec", {"seed": 0, "configs": {"a": {"k": 8}}})
        {'spec.seed': 0, 'spec.configs.a.k': 8}
    """
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        path: leaf
        for key, child in value.items()
        for path, leaf in flatten(f"{prefix}.{key}", child).items()
    }


PROJECT: Final = "bh-routing"
PARAMETER_LIMIT: Final = 500
"""Characters of a parameter; trackers reject longer ones."""
MEASURES: Final = (
    "avg_experts_per_token",
    "tokens_per_sec",
    "inference_time_sec",
    "expert_utilization_cv",
)
QUALITY: Final = ("delta_nll", "perplexity_ratio", "kl_mean", "mean_experts", "same_top1_share")
LEFT_OUT: Final = frozenset({".lock"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """Content of a run that is logged to every tracker."""

    name: str
    parameters: dict[str, str]
    metrics: dict[str, float]
    """`configuration/measure` -> number."""
    pictures: list[Path]
    files: list[Path]


def track_run(results: Results, tracker: str) -> str:
    """Log a results folder to a tracker.

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
    _, log = TRACKERS[tracker]
    try:
        return log(module, tracked(results), results.folder)
    except Exception as error:  # trackers raise exceptions of any type
        raise InputError(
            f"logging to {tracker} failed ({_reason(error)}); the results are kept, try again "
            f"with: bh-routing report {results.folder} --track {tracker}"
        ) from error


def find_tracker(tracker: str) -> ModuleType:
    """Import a tracker's package; call it before a long run.

    Raises:
        InputError: the tracker is unknown or not installed, or its store can't be used.
    """
    if tracker not in TRACKERS:
        raise InputError(f"tracker must be one of {', '.join(TRACKERS)}; got {tracker!r}")
    package, _ = TRACKERS[tracker]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"tracker {tracker!r} needs the package {package}; "
            f"install it with: pip install 'bh-routing[{tracker}]'"
        ) from error
    if tracker == "mlflow":
        _check_mlflow_store(module)
    return module


def _check_mlflow_store(mlflow: ModuleType) -> None:
    """Query the store: mlflow-skinny alone can't open MLflow's default, SQLite."""
    try:
        mlflow.search_experiments(max_results=1)
    except Exception as error:  # stores raise exceptions of any type
        raise InputError(
            f"MLflow can't use its store {mlflow.get_tracking_uri()} ({_reason(error)}); set "
            "MLFLOW_TRACKING_URI to a server, or install the package mlflow for a local store"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def tracked(results: Results) -> TrackedRun:
    """Collect the content to log."""
    finished = results.experiments[results.experiments["status"] == STATUS_OK]
    means = finished.groupby("config_name", sort=False)[list(MEASURES)].mean()
    metrics = {
        f"{name}/{measure}": float(value)
        for name, row in means.iterrows()
        for measure, value in row.items()
    }
    quality = (results.summary or {}).get("quality") or {}
    for row in quality.get("rules", []):
        metrics |= {
            f"{row['config_name']}/{m}": float(row[m]) for m in QUALITY if row.get(m) is not None
        }
    files = sorted(
        path
        for path in results.folder.rglob("*")
        if path.is_file() and not path.is_symlink() and path.name not in LEFT_OUT
    )
    is_picture = [path.parent.name == PLOTS and path.suffix == ".png" for path in files]
    return TrackedRun(
        name=results.folder.resolve().name,
        parameters={
            key: _short(value)
            for part in ("spec", "model", "provenance")
            for key, value in flatten(part, results.run.get(part)).items()
        },
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        pictures=[path for path, yes in zip(files, is_picture, strict=True) if yes],
        files=[path for path, yes in zip(files, is_picture, strict=True) if not yes],
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= PARAMETER_LIMIT else text[: PARAMETER_LIMIT - 1] + "…"


def _to_mlflow(mlflow: ModuleType, run: TrackedRun, folder: Path) -> str:
    mlflow.set_experiment(PROJECT)
    with mlflow.start_run(run_name=run.name) as started:
        mlflow.log_params({_mlflow_name(name): text for name, text in run.parameters.items()})
        mlflow.log_metrics({_mlflow_name(name): value for name, value in run.metrics.items()})
        for path in (*run.pictures, *run.files):
            inside = path.relative_to(folder).parent.as_posix()
            mlflow.log_artifact(str(path), None if inside == "." else inside)
        return f"MLflow run {started.info.run_id}"


def _mlflow_name(name: str) -> str:
    """Replace characters that MLflow doesn't allow in names."""
    return name.replace("@", "_at_").replace("+", "_plus_")


def _to_wandb(wandb: ModuleType, run: TrackedRun, folder: Path) -> str:
    with wandb.init(project=PROJECT, name=run.name, config=run.parameters) as started:
        pictures = {path.stem: wandb.Image(str(path)) for path in run.pictures}
        started.log({**run.metrics, **pictures})  # one step
        artifact = wandb.Artifact("results", type="results")
        for path in run.files:
            artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
        started.log_artifact(artifact)
        return f"W&B run {started.id}"


def _to_tensorboard(tensorboard: ModuleType, run: TrackedRun, folder: Path) -> str:
    from matplotlib.image import imread

    events = folder / "tensorboard"
    with tensorboard.SummaryWriter(str(events)) as writer:
        table = "\n".join(f"    {name}: {value}" for name, value in run.parameters.items())
        writer.add_text("parameters", table)
        for name, value in run.metrics.items():
            writer.add_scalar(name, value)
        for path in run.pictures:
            writer.add_image(path.stem, imread(path)[..., :3], dataformats="HWC")
    return str(events)


Log = Callable[[ModuleType, TrackedRun, Path], str]

TRACKERS: Final[Mapping[str, tuple[str, Log]]] = {
    "mlflow": ("mlflow", _to_mlflow),
    "wandb": ("wandb", _to_wandb),
    "tensorboard": ("tensorboardX", _to_tensorboard),
}
"""Name -> required package and logging function."""
