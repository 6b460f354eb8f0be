"""What differs is named and not mixed; what a name stood for before never shows under it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bh_routing.analysis.results import Results, load_results
from bh_routing.errors import ResultsError
from bh_routing.experiments.run import run
from bh_routing.nulls.calibration import Calibration
from bh_routing.report.traces import read_traces
from bh_routing.results.files import planned_keys
from bh_routing.results.records import (
    CALIBRATION,
    CHECKPOINT,
    JOURNAL,
    QUALITY_JOURNAL,
    RESULTS_CSV,
    RUN_JSON,
    TIMINGS,
    TOKEN_TRACES,
    journal_seed,
    line_checksum,
)
from tests.experiments.conftest import (
    TINY_CONFIGS,
    TINY_PROMPTS,
    MakeTinySpec,
    make_detail,
    make_record,
    read_folder,
)
from tests.experiments.test_store import IDENTITY, PLAN, fill, open_store

pytestmark = pytest.mark.usefixtures("loaded_demo")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": "other", "model_fingerprint": "0" * 64}, "model (--model): demo"),
        ({"dtype": "bfloat16", "model_fingerprint": "0" * 64}, "dtype (--no-fp16): float32 there"),
        ({"device_type": "cuda"}, "device (--device): cpu there, cuda now"),
        ({"max_tokens": 50}, "--max-tokens: 4 there, 50 now"),
        ({"device_name": "H200"}, "device's product: H100 there, H200 now"),
        ({"versions": {"torch": "2.13.0"}}, "torch: 2.12.0 there, 2.13.0 now"),
        ({"tokenizer": "2" * 64}, "tokenizer: 11111111… there, 22222222… now"),
        (
            {"model_fingerprint": "0" * 64, "settings": {"config": {"norm_topk_prob": True}}},
            "model's settings: config.norm_topk_prob: False there, True now",
        ),
        (
            {"settings": {"config": {"norm_topk_prob": False}, "generation_config": {"top_k": 5}}},
            "model's settings: generation_config: None there, {'top_k': 5} now",
        ),
    ],
)
def test_results_of_another_run_are_not_mixed_in(
    tmp_path: Path, changes: dict[str, object], part: str
) -> None:
    fill(tmp_path, range(2))
    before = read_folder(tmp_path)
    with open_store(tmp_path) as store, pytest.raises(ResultsError) as caught:
        store.begin(replace(IDENTITY, **changes), {}, PLAN)  # type: ignore[arg-type]
    text = str(caught.value)
    assert part in text and "--no-resume" in text and "--output" in text
    assert text.count(" there") == 1, "one cause, one difference"
    assert read_folder(tmp_path) == before


def test_tables_of_further_nulls_may_come_later_but_never_others_of_the_same(
    tmp_path: Path,
) -> None:
    fill(tmp_path, range(1))
    a, b = {"background": "a" * 64}, {"needed": "b" * 64}
    for tables in (a, {}, b, a):
        with open_store(tmp_path) as store:
            store.begin(replace(IDENTITY, tables=tables), {}, PLAN)
    assert json.loads((tmp_path / RUN_JSON).read_text())["identity"]["tables"] == a | b
    with (
        open_store(tmp_path) as store,
        pytest.raises(ResultsError, match=r"null 'needed' .*: bbbbbbbb… there, cccccccc… now"),
    ):
        store.begin(replace(IDENTITY, tables={"needed": "c" * 64}), {}, PLAN)


@pytest.mark.parametrize("stored", [None, 3, "versions", ["versions"], {"versions": None}])
def test_an_identity_that_is_none_differs(stored: object) -> None:
    assert len(IDENTITY.differences(stored)) == 1


def test_a_folder_of_an_older_version_is_read_but_not_gone_on_with(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    document = json.loads((tmp_path / RUN_JSON).read_text())
    new = ("settings", "tokenizer", "device_name", "versions", "tables")
    document["identity"] = {k: v for k, v in document["identity"].items() if k not in new}
    document["identity"]["calibration"] = "a" * 64
    chain = journal_seed(document["identity"])
    lines = []
    for line in (tmp_path / JOURNAL).read_bytes().splitlines():
        body = {k: v for k, v in json.loads(line).items() if k != "checksum"}
        chain = line_checksum(chain, body)
        lines.append(json.dumps({**body, "checksum": chain}, ensure_ascii=False) + "\n")
    (tmp_path / JOURNAL).write_text("".join(lines))
    (tmp_path / RUN_JSON).write_text(json.dumps(document))
    (tmp_path / CHECKPOINT).unlink()
    assert len(load_results(tmp_path).experiments) == 2
    before = read_folder(tmp_path)
    with open_store(tmp_path) as store, pytest.raises(ResultsError, match="an older version"):
        store.begin(IDENTITY, {}, PLAN)
    assert read_folder(tmp_path) == before


def test_readers_take_the_experiments_of_the_last_plan_whatever_their_name(tmp_path: Path) -> None:
    for key, experts in (("old", 1.0), ("new", 2.0)):
        with open_store(tmp_path) as store:
            store.begin(IDENTITY, {}, [key])
            store.add(key, make_record(min_experts=experts), make_detail())
    with open_store(tmp_path) as store:
        store.begin(IDENTITY, {}, ["old"])  # a configuration that was redefined is set back
    for _ in range(2):
        assert load_results(tmp_path).experiments["min_experts"].tolist() == [1.0]
        (tmp_path / RESULTS_CSV).unlink(missing_ok=True)


def test_what_was_measured_of_an_old_rule_never_shows_under_its_name(
    tiny_spec: MakeTinySpec, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was day 1 at sea.\n<|endoftext|>\nIt was day 2 at sea.")

    def go_on(p: float, **changes: Any) -> Results:
        configs = {"mine": {"method": "top_p", "p": p}, "topk_8": TINY_CONFIGS["topk_8"]}
        measured = {"no_eval": False, "timing_rounds": 1, "token_traces": 1} | changes
        run(tiny_spec(configs=configs, prompts=TINY_PROMPTS[:1], texts=[text], **measured))
        return load_results(tmp_path / "results")

    def rule_of_mine(results: Results) -> set[float]:
        return {r.rule["p"] for r in results.quality if r.config_name == "mine"}

    first = go_on(0.8)
    assert rule_of_mine(first) == {0.8}
    assert {"topk_8", "mine"} < {r.config_name for r in first.quality}  # and static references
    # Killed before anything but the experiments was made anew.
    (tmp_path / "kept").mkdir()
    for name in (TIMINGS, TOKEN_TRACES):
        (tmp_path / "kept" / name).write_bytes((tmp_path / "results" / name).read_bytes())
    go_on(0.3, no_eval=True, timing_rounds=0, token_traces=0)
    for name in (TIMINGS, TOKEN_TRACES):
        (tmp_path / "kept" / name).rename(tmp_path / "results" / name)
    stale = load_results(tmp_path / "results")
    assert rule_of_mine(stale) == set()
    assert "topk_8" in {r.config_name for r in stale.quality}
    assert set(stale.timings["config_name"]) == {"topk_8"}
    planned = planned_keys(stale.run)
    assert {trace.config_name for trace in read_traces(stale.folder, planned)} == {"topk_8"}
    assert rule_of_mine(go_on(0.3)) == {0.3}
    before = (tmp_path / "results" / QUALITY_JOURNAL).read_bytes()
    assert rule_of_mine(go_on(0.8)) == {0.8}  # set back: what was scored of it is found again
    assert (tmp_path / "results" / QUALITY_JOURNAL).read_bytes() == before


def test_a_configuration_of_another_null_is_added_and_what_is_there_stays(
    tiny_spec: MakeTinySpec, demo_calibration: Calibration, tmp_path: Path
) -> None:
    path = demo_calibration.save(tmp_path / "mine.safetensors")
    configs: dict[str, dict[str, Any]] = {"bh": {"method": "bh", "alpha": 0.05}}
    run(tiny_spec(configs=configs, calibration=path, prompts=TINY_PROMPTS[:1]))
    added = {
        "studentised": {"method": "bh", "alpha": 0.05, "null": "background_studentized"},
        "drop": {"method": "bh_drop", "alpha": 0.2, "statistic": "contribution"},
    }
    for name, config in added.items():
        configs |= {name: config}
        outcome = run(tiny_spec(configs=configs, prompts=TINY_PROMPTS[:1]))
        assert (outcome.num_run, outcome.num_reused) == (1, len(configs) - 1)
    kept = Calibration.load(outcome.folder / CALIBRATION)
    assert kept.nulls == ("background", "background_studentized", "pooled", "needed")
    assert demo_calibration.table_fingerprints.items() < kept.table_fingerprints.items()
    document = json.loads((outcome.folder / RUN_JSON).read_bytes())
    assert document["identity"]["tables"] == kept.table_fingerprints
    assert document["calibration"]["fingerprint"] == kept.fingerprint
    # Killed between run.json and the calibration's file: what is lost is fitted again, alike.
    demo_calibration.save(outcome.folder / CALIBRATION)
    again = run(tiny_spec(configs=configs, prompts=TINY_PROMPTS[:2]))
    assert (again.num_run, again.num_reused) == (3, 3)
    assert Calibration.load(outcome.folder / CALIBRATION).fingerprint == kept.fingerprint
