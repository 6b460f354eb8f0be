"""A finished run in MLflow's file store, W&B's offline log and TensorBoard's event files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from bh_routing.analysis.results import load_results
from bh_routing.analysis.trackers import find_tracker, track_run
from bh_routing.errors import InputError
from bh_routing.experiments.spec_errors import name_commands
from bh_routing.report import create_visualizations
from bh_routing.results.records import RUN_JSON
from tests.report.conftest import FillFolder, MakeResults, fill_folder, make_results

__all__ = ["fill_folder", "make_results"]  # fixtures


@pytest.fixture
def folder(fill_folder: FillFolder, make_results: MakeResults) -> Path:
    results = make_results()
    filled = fill_folder(results)
    create_visualizations(results, filled)
    return filled


def test_mlflow_gets_settings_numbers_pictures_and_files(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    store = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    said = track_run(load_results(folder), "mlflow")
    client = mlflow.MlflowClient(store.as_uri())
    run = client.get_run(said.split()[-1])
    assert run.data.params["spec.max_tokens"] == "50"
    assert run.data.metrics["topk_8/avg_experts_per_token"] == 8.0
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"plots", "bh_routing_results.csv", "run.json"} <= names


def test_tensorboard_gets_numbers_and_pictures(folder: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    [path] = Path(track_run(load_results(folder), "tensorboard")).iterdir()
    content, values = path.read_bytes(), {}
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        for value in Event.FromString(content[12 : 12 + size]).summary.value:
            values[value.tag] = value
        content = content[16 + size :]
    assert values["topk_8/avg_experts_per_token"].simple_value == 8.0
    assert values["avg_experts_comparison"].image.width > 100


def test_wandb_gets_settings_numbers_pictures_and_files(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs wandb, which isn't among the dev extras")
    store = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for place in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{place}", str(store))
    run_id = track_run(load_results(folder), "wandb").split()[-1]
    [path] = store.glob(f"wandb/offline-run-*/run-{run_id}.wandb")
    records = wandb_records(path.read_bytes())
    config = {item.key: item.value_json for r in records for item in r.run.config.update}
    assert config["spec.max_tokens"] == '"50"'
    history = {
        "/".join(item.nested_key) or item.key: item.value_json
        for record in records
        for item in record.history.item
    }
    assert float(history["topk_8/avg_experts_per_token"]) == 8.0
    assert int(history["avg_experts_comparison/width"]) > 100
    names = {entry.path for record in records for entry in record.artifact.manifest.contents}
    assert {"bh_routing_results.csv", "run.json"} <= names


def wandb_records(content: bytes) -> list[Any]:
    """Read W&B's log: LevelDB's format, blocks of 32 KiB, after a header of 7 bytes."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    records, parts, at = [], b"", 7
    while at + 7 <= len(content):
        if 32_768 - at % 32_768 < 7:  # a block's end too small for another header
            at += 32_768 - at % 32_768
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            records.append(protocol.Record.FromString(parts))
            parts = b""
    return records


def test_an_unknown_or_missing_tracker_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="one of mlflow, wandb, tensorboard; got 'excel'"):
        track_run(load_results(folder), "excel")
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(InputError, match=r"bh-routing\[wandb\]"):
        track_run(load_results(folder), "wandb")


def test_a_name_that_mlflow_would_not_take_is_logged_in_another_form(
    fill_folder: FillFolder,
    make_results: MakeResults,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    folder = fill_folder(make_results({"topk_8": 8.0, "top_p@5": 5.0, "a+b": 4.0}, 3))
    run = json.loads((folder / RUN_JSON).read_text())
    run["spec"]["configs"] = {"top_p@5": {"method": "top_p"}}
    (folder / RUN_JSON).write_text(json.dumps(run))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run_id = track_run(load_results(folder), "mlflow").split()[-1]
    data = mlflow.MlflowClient((tmp_path / "store").as_uri()).get_run(run_id).data
    metrics = data.metrics
    assert data.params["spec.configs.top_p_at_5.method"] == "top_p"
    assert metrics["top_p_at_5/avg_experts_per_token"] == pytest.approx(5.0, abs=0.3)
    assert metrics["a_plus_b/avg_experts_per_token"] == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize("store", ["sqlite:////nowhere/mlflow.db", "nonsense://x"])
def test_a_store_that_cannot_be_used_is_named_before_the_run(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with pytest.raises(InputError, match=r"MLflow can't use its store .*MLFLOW_TRACKING_URI"):
        find_tracker("mlflow")


def test_logging_that_fails_keeps_the_results_and_says_how_to_try_again(folder: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    (folder / "tensorboard").write_text("a file where events would go")
    again = r"track_run\(load_results\('.*'\), 'tensorboard'\)"
    with pytest.raises(InputError, match=again) as caught:
        track_run(load_results(folder), "tensorboard")
    advice = f"run: bh-routing report {folder} --track tensorboard"
    assert name_commands(str(caught.value)).endswith(advice)
