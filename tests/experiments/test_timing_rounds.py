"""Rounds of a real run on the demo model: every configuration in each, in changing order."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from bh_routing.analysis.results import load_results
from bh_routing.experiments.run import run
from bh_routing.report.conclusion import conclude_run
from bh_routing.results.records import REPORT_MD, RUN_JSON, SUMMARY_JSON, TIMINGS
from tests.experiments.conftest import TINY_CONFIGS, TINY_PROMPTS, MakeTinySpec

pytestmark = pytest.mark.usefixtures("loaded_demo")


def test_each_round_times_every_configuration_in_an_order_of_its_own(
    tiny_spec: MakeTinySpec,
) -> None:
    spec = tiny_spec(timing_rounds=6)
    outcome = run(spec, conclude_run)
    assert outcome.problems == ()
    table = load_results(spec.output).timings
    assert list(table["round"]) == [round_ for round_ in range(1, 7) for _ in TINY_CONFIGS]
    orders = table.groupby("round")["config_name"].agg(tuple)
    assert set(orders) == {("topk_8", "bh"), ("bh", "topk_8")}
    prompts = table.groupby("round")["prompt_text"].agg(lambda texts: texts.iloc[0])
    assert list(prompts) == [prompt["text"] for prompt in TINY_PROMPTS] * 2
    assert (table["num_output_tokens"] == 4).all()
    assert (table[["prefill_time_sec", "decode_time_sec"]] > 0).all(axis=None)
    speed = json.loads((spec.output / SUMMARY_JSON).read_text())["speed"]
    assert speed["topk_8"]["whole"] == {"n": 6, "mean": 1.0, "low": None, "high": None}
    whole = speed["bh"]["whole"]
    assert 0 < whole["low"] < whole["mean"] < whole["high"]
    shown = f"{whole['mean']:.2f} [{whole['low']:.2f}, {whole['high']:.2f}]"
    assert shown in (spec.output / REPORT_MD).read_text(encoding="utf-8")


def test_going_on_times_anew_only_what_cannot_be_compared(tiny_spec: MakeTinySpec) -> None:
    spec = tiny_spec(timing_rounds=1)
    path = spec.output / TIMINGS
    run(spec)
    first = path.read_bytes()
    run(spec)
    assert path.read_bytes() == first
    wider = {**TINY_CONFIGS, "topk_4": {"method": "topk", "k": 4}}
    run(tiny_spec(timing_rounds=1, configs=wider))
    assert set(pd.read_csv(path)["config_name"]) == set(wider)
    before = path.read_bytes()
    changed = {**wider, "topk_4": {"method": "topk", "k": 2}}  # the same name, another rule
    run(tiny_spec(timing_rounds=1, configs=changed))
    assert path.read_bytes() != before
    back = run(tiny_spec(timing_rounds=1, configs=wider))  # nothing runs anew, and yet …
    assert back.num_run == 0
    planned = json.loads((spec.output / RUN_JSON).read_text())["plans"][-1]
    assert set(pd.read_csv(path)["key"]) <= set(planned)
    path.write_text("no table")
    run(spec)
    assert set(pd.read_csv(path)["config_name"]) == set(TINY_CONFIGS)
    run(tiny_spec(timing_rounds=0))
    assert not path.exists()
