from __future__ import annotations

import csv
import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bh_routing.engine.generate import generate_routed
from bh_routing.errors import CalibrationError, InputError, ResultsError
from bh_routing.experiments.configurations import NamedRule, make_rules
from bh_routing.experiments.executors import Cell, attempt
from bh_routing.experiments.experiment import Experiment, Subject, run_experiment
from bh_routing.experiments.run import run
from bh_routing.experiments.specs import Prompt
from bh_routing.models.load import LoadedModel
from bh_routing.nulls.calibration import Calibration
from bh_routing.report.conclusion import conclude_run
from bh_routing.results.records import (
    CALIBRATION,
    CSV_COLUMNS,
    JOURNAL,
    LOG,
    REPORT_HTML,
    RESULTS_CSV,
    RUN_JSON,
    STATUS_FAILED,
    SUMMARY_JSON,
    TIME_COLUMNS,
)
from tests.experiments.conftest import TINY_CONFIGS, TINY_PROMPTS, MakeTinySpec, read_folder

CUSTOM = {
    "method": "bh",
    "alpha": 0.03,
    "temperature": 1.5,
    "min_k": 2,
    "max_k": 10,
    "description": "between two and ten",
}

GENERATE = "bh_routing.experiments.experiment.generate_routed"

pytestmark = pytest.mark.usefixtures("loaded_demo")


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / RESULTS_CSV).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_times(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: cell for name, cell in row.items() if name not in TIME_COLUMNS} for row in rows]


def test_one_experiment_measures_what_was_kept(
    demo: LoadedModel, demo_calibration: Calibration
) -> None:
    (custom,) = make_rules({"my_custom_config": CUSTOM})
    prompt = Prompt(text="The old man walked down to the river and", category="simple")
    subject = Subject(demo.model, demo.tokenizer, demo_calibration)
    record, detail = run_experiment(subject, custom, prompt, 12)
    assert 2 <= record.min_experts <= record.avg_experts_per_token <= record.max_experts <= 10
    assert record.max_experts > 8, "max_k 10 lets some tokens exceed the model's own 8"
    assert record.std_experts_per_token > 0
    num_units = (record.num_input_tokens + record.num_output_tokens - 1) * 6
    histogram = torch.tensor(detail.count_histogram)
    assert histogram.sum() == num_units
    total = (histogram * torch.arange(histogram.shape[1])).sum()
    assert total == torch.tensor(detail.expert_load).sum()
    assert record.avg_experts_per_token == pytest.approx(float(total) / num_units)
    assert len(detail.output_token_ids) == record.num_output_tokens <= 12
    assert record.inference_time_sec == pytest.approx(
        record.prefill_time_sec + record.decode_time_sec
    )


def test_one_token_leaves_no_decode_mean(demo: LoadedModel) -> None:
    (top_k,) = make_rules({"topk_8": TINY_CONFIGS["topk_8"]})
    record, _ = run_experiment(
        Subject(demo.model, demo.tokenizer, None), top_k, Prompt(text="A"), 1
    )
    assert record.num_output_tokens == 1
    assert math.isnan(record.avg_experts_decode)
    assert record.avg_experts_prefill == 8.0


def test_a_run_leaves_its_files(tiny_spec: MakeTinySpec) -> None:
    spec = tiny_spec()
    outcome = run(spec)
    assert (outcome.exit_code, outcome.num_run, outcome.num_reused) == (0, 6, 0)
    rows = read_rows(spec.output)
    assert list(rows[0]) == list(CSV_COLUMNS)
    assert [(row["config_name"], row["prompt_text"]) for row in rows] == [
        (name, prompt["text"]) for name in TINY_CONFIGS for prompt in TINY_PROMPTS
    ]
    assert {row["avg_experts_per_token"] for row in rows[:3]} == {"8.0"}
    document = json.loads((spec.output / RUN_JSON).read_bytes())
    assert document["spec"]["configs"]["topk_8"]["method"] == "top_k"
    assert document["model"]["num_experts"] == 64
    assert document["calibration"] is None
    assert document["nulls"][0]["alpha_is"] == "error rate"
    assert document["timing"]["experiments_sec"] > 0
    assert document["timing"]["startup_sec"] > 0
    assert document["peak_memory_bytes"] > 1_000_000


def test_the_log_file_says_each_experiment_and_only_grows(tiny_spec: MakeTinySpec) -> None:
    spec = tiny_spec()
    run(spec)
    first = (spec.output / LOG).read_text(encoding="utf-8")
    assert "loaded demo" in first and "[6/6] bh on 'Water boils at'" in first
    assert "warmed up" in first
    run(spec)
    assert (spec.output / LOG).read_text(encoding="utf-8").startswith(first)


def test_logging_is_as_before_when_a_run_ends(tiny_spec: MakeTinySpec) -> None:
    logger = logging.getLogger("bh_routing")
    before = (logger.level, list(logger.handlers))
    run(tiny_spec())
    assert (logger.level, list(logger.handlers)) == before


def test_a_second_run_does_nothing_twice(tiny_spec: MakeTinySpec) -> None:
    spec = tiny_spec()
    run(spec)
    journal, rows = (spec.output / JOURNAL).read_bytes(), read_rows(spec.output)
    outcome = run(spec)
    assert (outcome.num_run, outcome.num_reused) == (0, 6)
    assert (spec.output / JOURNAL).read_bytes() == journal
    assert read_rows(spec.output) == rows


def test_an_added_configuration_and_prompt_run_alone(tiny_spec: MakeTinySpec) -> None:
    run(tiny_spec(configs={"bh": TINY_CONFIGS["bh"]}, prompts=TINY_PROMPTS[1:]))
    outcome = run(tiny_spec())
    assert (outcome.num_run, outcome.num_reused) == (4, 2)
    assert [row["config_name"] for row in read_rows(outcome.folder)] == ["topk_8"] * 3 + ["bh"] * 3


def test_a_changed_configuration_of_the_same_name_runs_again(tiny_spec: MakeTinySpec) -> None:
    run(tiny_spec())
    changed = TINY_CONFIGS | {"bh": TINY_CONFIGS["bh"] | {"min_k": 3}}
    outcome = run(tiny_spec(configs=changed))
    assert (outcome.num_run, outcome.num_reused) == (3, 3)
    assert {row["min_experts"] for row in read_rows(outcome.folder)[3:]} == {"3.0"}


def test_a_failing_experiment_becomes_a_row_and_is_tried_again(
    tiny_spec: MakeTinySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_on_the_river(model: Any, tokenizer: Any, prompt: str, *rest: Any) -> Any:
        if "river" in prompt:
            raise RuntimeError("the river\nis dry")
        return generate_routed(model, tokenizer, prompt, *rest)

    monkeypatch.setattr(GENERATE, fail_on_the_river)
    outcome = run(tiny_spec())
    assert outcome.exit_code == 1
    assert len(outcome.problems) == 2
    assert "bh on 'The river" in outcome.problems[1]
    assert "RuntimeError: the river is dry" in outcome.problems[1]
    rows = read_rows(outcome.folder)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"] * 2
    monkeypatch.setattr(GENERATE, generate_routed)
    again = run(tiny_spec())
    assert (again.exit_code, again.num_run) == (0, 2)
    assert {row["status"] for row in read_rows(again.folder)} == {"ok"}


def make_cell() -> Cell:
    (rule,) = make_rules({"topk_8": TINY_CONFIGS["topk_8"]})
    return Cell("key", rule, Prompt(text="A"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_is_tried_twice_then_recorded_with_the_remedies(error: Exception) -> None:
    calls = []

    def experiment(*arguments: Any) -> Experiment:
        calls.append(arguments)
        raise error

    subject = Subject(None, None, None)
    record = attempt(subject, make_cell(), 4, experiment).record
    assert len(calls) == 2
    assert record.status == STATUS_FAILED
    assert all(word in record.error for word in ("--device cpu", "fewer tokens", "dtype"))


def test_out_of_memory_once_costs_nothing(demo: LoadedModel) -> None:
    calls = []

    def experiment(
        subject: Subject, named_rule: NamedRule, prompt: Prompt, tokens: int
    ) -> Experiment:
        calls.append(prompt)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_experiment(subject, named_rule, prompt, tokens)

    subject = Subject(demo.model, demo.tokenizer, None)
    assert attempt(subject, make_cell(), 4, experiment).record.status == "ok"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"prompts": [{"text": "word " * 2000}]}, "prompt 1 ('word word"),
        ({"max_tokens": 5000}, "leaves 0 next to 5000"),
        (
            {"configs": {"x": {"method": "bh", "alpha": 0.1, "max_k": 65}}},
            "configuration 'x': max_k",
        ),
        ({"configs": {"x": {"method": "topk", "k": 65}}}, "configuration 'x': k must"),
        ({"calibration": Path("nowhere.safetensors"), "configs": {"x": CUSTOM}}, "nowhere"),
        ({"calibration_texts": [Path("nowhere.txt")], "configs": {"x": CUSTOM}}, "nowhere.txt"),
        ({"no_eval": False, "texts": [Path("nowhere.txt")]}, "nowhere.txt"),
    ],
)
def test_what_cannot_run_is_refused_before_a_folder_is_made(
    tiny_spec: MakeTinySpec, changes: dict[str, Any], part: str
) -> None:
    spec = tiny_spec(**changes)
    with pytest.raises(InputError) as caught:
        run(spec)
    assert part in str(caught.value)
    assert not spec.output.exists()


def test_a_calibration_out_of_reach_is_refused_by_configuration(
    tiny_spec: MakeTinySpec, demo_calibration: Calibration, tmp_path: Path
) -> None:
    path = demo_calibration.save(tmp_path / "calibration.safetensors")
    strict = {"x": {"method": "bh", "alpha": 1e-6}}
    with pytest.raises(CalibrationError, match="configuration 'x': alpha"):
        run(tiny_spec(configs=strict, calibration=path))


def test_other_results_are_refused_and_left_alone(tiny_spec: MakeTinySpec) -> None:
    spec = tiny_spec()
    run(spec)
    before = read_folder(spec.output)
    with pytest.raises(ResultsError, match="--max-tokens: 4 there, 5 now"):
        run(tiny_spec(max_tokens=5))
    assert read_folder(spec.output) == before
    outcome = run(tiny_spec(max_tokens=5, resume=False))
    (moved,) = spec.output.glob("previous-*")
    assert outcome.num_run == 6
    assert read_folder(moved) == {name: text for name, text in before.items() if name != ".lock"}


def test_a_resumed_run_takes_the_calibration_of_its_folder(
    tiny_spec: MakeTinySpec, demo_calibration: Calibration, tmp_path: Path
) -> None:
    path = demo_calibration.save(tmp_path / "mine.safetensors")
    configs = {"x": CUSTOM}
    spec = tiny_spec(configs=configs, calibration=path, prompts=TINY_PROMPTS[:1])
    run(spec)
    kept = Calibration.load(spec.output / CALIBRATION)
    assert kept.fingerprint == demo_calibration.fingerprint
    document = json.loads((spec.output / RUN_JSON).read_bytes())
    assert document["calibration"]["num_tokens"] == demo_calibration.num_tokens
    # Without --calibration the packaged text is asked for, which this one was made from.
    outcome = run(tiny_spec(configs=configs, prompts=TINY_PROMPTS[:2]))
    assert (outcome.num_run, outcome.num_reused) == (1, 1)
    assert "using the calibration in" in (spec.output / LOG).read_text(encoding="utf-8")
    # A run that needs none keeps what is known of it.
    run(tiny_spec(configs={"topk_8": TINY_CONFIGS["topk_8"]}))
    later = json.loads((spec.output / RUN_JSON).read_bytes())
    assert later["calibration"] == document["calibration"]


def test_a_step_of_the_conclusion_that_fails_loses_nothing(tiny_spec: MakeTinySpec) -> None:
    seen: list[Any] = []

    def report(results: Any, summary: dict[str, Any], folder: Path) -> None:
        seen.append((results, summary, folder))
        raise ValueError("no ink")

    spec = tiny_spec()
    conclude = partial(
        conclude_run,
        analyze=lambda rows: {"n": len(rows), "p": math.nan},
        visualize=lambda *_: None,
        report=report,
    )
    outcome = run(spec, conclude)
    assert outcome.exit_code == 1
    assert outcome.problems == (
        "writing the report failed (ValueError: no ink); every finished experiment is kept",
    )
    assert len(seen[0][0]) == 6 and seen[0][2] == spec.output
    assert json.loads((spec.output / SUMMARY_JSON).read_bytes()) == {"n": 6, "p": None}
    assert len(read_rows(spec.output)) == 6
    assert (spec.output / REPORT_HTML).exists()


def test_an_interrupted_run_keeps_what_finished_and_goes_on(
    tiny_spec: MakeTinySpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt_the_fifth(*arguments: Any, **keywords: Any) -> Experiment:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return attempt(*arguments, **keywords)

    calls: list[Any] = []
    spec = tiny_spec()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bh_routing.experiments.executors.attempt", interrupt_the_fifth)
        run(spec)
    assert len(read_rows(spec.output)) == 4
    assert "4 of 6 experiments are finished and kept" in caplog.text
    outcome = run(spec)
    assert (outcome.num_run, outcome.num_reused) == (2, 4)
    whole = run(tiny_spec(output=spec.output.with_name("whole")))
    assert without_times(read_rows(whole.folder)) == without_times(read_rows(spec.output))


def test_quality_is_scored_once_and_resumed(tiny_spec: MakeTinySpec, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"It was day {i} at sea." for i in range(3)))
    spec = tiny_spec(no_eval=False, texts=[text], prompts=TINY_PROMPTS[:1])
    assert run(spec).exit_code == 0
    scores = (spec.output / "quality.jsonl").read_bytes()
    scored = [json.loads(line)["record"]["config_name"] for line in scores.splitlines()[1:]]
    # Three documents each; static top-k on both sides of the mean of the rule under test.
    assert scored.count("topk_8") == 3
    assert {name for name in scored if name.startswith("topk_")} > {"topk_8"}
    assert len(scored) == 3 * len(set(scored))
    assert run(spec).exit_code == 0
    assert (spec.output / "quality.jsonl").read_bytes() == scores
    before = read_folder(spec.output)
    with pytest.raises(ResultsError, match="another text or setting"):
        run(tiny_spec(no_eval=False, texts=[text], tokens=7, prompts=TINY_PROMPTS[:1]))
    assert read_folder(spec.output) == before
