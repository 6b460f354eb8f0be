"""The public functions on the demo model."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import bh_routing as bhr
from bh_routing.cli import main
from bh_routing.experiments.specs import (
    CalibrateSpec,
    EvaluateSpec,
    ModelSpec,
    PruneSpec,
    RunSpec,
    SweepSpec,
)
from bh_routing.models import LoadedModel
from bh_routing.rules import RULES


@pytest.mark.parametrize(
    ("asked", "fitted"),
    [
        ({}, ("background",)),
        ({"rules": [bhr.BenjaminiHochberg(0.1, null="pooled"), bhr.TopK(4)]}, ("pooled",)),
        ({"rules": {"a": bhr.ContributionThreshold(0.1, statistic="contribution")}}, ("needed",)),
        (
            {"rules": [bhr.BenjaminiHochberg(), bhr.BenjaminiHochberg(0.1)], "nulls": ["pooled"]},
            ("background", "pooled"),
        ),
    ],
)
def test_what_rules_need_is_fitted_and_nothing_else(
    demo: LoadedModel, asked: dict[str, Any], fitted: tuple[str, ...]
) -> None:
    texts = [document.text for document in bhr.packaged_documents("calibration")[:2]]
    assert bhr.calibrate(*demo, texts, max_tokens=60, **asked).nulls == fitted


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rules": [bhr.TopK(4), bhr.TopP(0.8)]}, "no calibration is needed by top_k, top_p"),
        ({"rules": ["bh"]}, "a rule must be an object .* got 'bh' of type str"),
        ({"rules": [bhr.BenjaminiHochberg]}, "a rule must be an object .* of type ABCMeta"),
        ({"rules": bhr.TopK(4)}, r"must be a list .* got TopK\(k=4.*; for one rule write \[rule\]"),
        ({"rules": "bh"}, "must be a list .* got 'bh'"),
        ({"nulls": ["backgroud"]}, "did you mean 'background'"),
    ],
)
def test_what_cannot_be_fitted_is_rejected_in_one_sentence(
    demo: LoadedModel, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(bhr.InputError, match=message):
        bhr.calibrate(*demo, ["some text"], **asked)


def test_a_parameter_has_one_default_wherever_it_is() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(bhr.BenjaminiHochberg)}
    for function in (
        bhr.benjamini_hochberg_routing,
        bhr.benjamini_hochberg,
        bhr.benjamini_yekutieli,
        bhr.storey,
        bhr.p_values,
    ):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in fields and name != "null" and parameter.default is not parameter.empty:
                assert parameter.default == fields[name], f"{function.__name__}: {name}"


@pytest.mark.parametrize(
    ("function", "spec", "renamed"),
    [
        (bhr.load_model, ModelSpec, {}),
        (bhr.calibrate, CalibrateSpec, {}),
        (bhr.evaluate, EvaluateSpec, {"max_tokens": "tokens"}),
        (bhr.sweep, SweepSpec, {"max_tokens": "tokens"}),
        (bhr.generate, RunSpec, {"max_new_tokens": "max_tokens"}),
        (bhr.prune, PruneSpec, {}),
    ],
)
def test_a_function_has_the_defaults_of_its_command(
    function: Callable[..., Any], spec: type[ModelSpec], renamed: dict[str, str]
) -> None:
    parameters = inspect.signature(function).parameters.values()
    ours = {renamed.get(p.name, p.name): p.default for p in parameters if p.default is not p.empty}
    theirs = {name: spec.model_fields[name].default for name in ours.keys() & spec.model_fields}
    # Nulls follow from the rules, None is the packaged text and the margin's constant, and `run`'s
    # batches are windows of text, not prompts.
    for name in ("nulls", "calibration_texts", "margin", *["batch_size"] * (spec is RunSpec)):
        theirs.pop(name, None)
    assert len(theirs) >= 2
    assert {name: ours[name] for name in theirs} == theirs
    assert CalibrateSpec.model_fields["nulls"].default == [bhr.BenjaminiHochberg().null]


def pages(split: str, words: int, documents: int = 6) -> list[bhr.Document]:
    """The starts of some packaged documents."""
    return [
        document._replace(text=" ".join(document.text.split()[:words]))
        for document in bhr.packaged_documents(split)[:documents]
    ]


def write_jsonl(path: Path, documents: Sequence[bhr.Document]) -> str:
    path.write_text("\n".join(json.dumps(document._asdict()) for document in documents))
    return str(path)


def read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=["", "nan"])


def test_evaluate_gives_the_numbers_of_the_command_line(
    demo: LoadedModel,
    demo_calibration: bhr.Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    documents = pages("evaluation", 20, documents=24)  # enough for a bootstrap, which has a seed
    command = ["evaluate", "--model", "demo", "--device", "cpu", "--output", str(tmp_path / "out")]
    command += ["--text", write_jsonl(tmp_path / "text.jsonl", documents), "--rule", "top_k:k=4"]
    command += ["--calibration", str(demo_calibration.save(tmp_path / "c.safetensors"))]
    assert main([*command, "--rule", "bh:alpha=0.05"]) == 0
    rules = [bhr.TopK(4), bhr.BenjaminiHochberg()]
    table = bhr.evaluate(*demo, rules, documents, demo_calibration)
    assert list(table["config_name"]) == ["top_k_k-4", "bh_alpha-0.05"]
    assert bool((table["delta_nll_low"] < table["delta_nll"]).all())
    printed = read_table(tmp_path / "out" / "quality.csv")
    assert list(table.columns) == list(printed.columns)
    numbers = table.select_dtypes("number").columns
    assert len(numbers) > 20
    pd.testing.assert_frame_equal(table[numbers], printed[numbers], check_dtype=False)


def test_rules_are_named_by_a_mapping_and_texts_may_be_strings(demo: LoadedModel) -> None:
    texts = [document.text for document in pages("evaluation", 20)]
    table = bhr.evaluate(*demo, {"half": bhr.TopK(4), "own": bhr.TopK(8)}, texts, max_tokens=60)
    assert list(table["config_name"]) == ["half", "own"]
    assert list(table["delta_nll"] == 0) == [False, True]
    assert set(table["tokens"]) == {60}


def test_sweep_gives_the_numbers_of_the_command_line(
    demo: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The command line times numbers of threads, unless told, and sums depend on them.
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    documents, source = pages("evaluation", 60), pages("calibration", 60)
    command = ["sweep", "--model", "demo", "--device", "cpu", "--output", str(tmp_path / "out")]
    command += ["--text", write_jsonl(tmp_path / "text.jsonl", documents), "--rule", "min_p"]
    command += ["--calibration-text", write_jsonl(tmp_path / "source.jsonl", source)]
    assert main([*command, "--budget", "5", "--budget", "3"]) == 0
    rules = [bhr.MinP(0.5), bhr.TopK(4)]
    table = bhr.sweep(*demo, rules, [5, 3], documents, source)
    swept = table[table["rule"] != "top_k"]
    assert list(zip(swept["rule"], swept["budget"], strict=True)) == [("min_p", 5), ("min_p", 3)]
    assert list(swept["config_name"]) == ["min_p@5", "min_p@3"]
    assert bool((abs(swept["calibration_mean_experts"] / swept["budget"] - 1) < 0.02).all())
    printed = read_table(tmp_path / "out" / "points.csv")
    numbers = table[[c for c in table if c in printed]].select_dtypes("number").columns
    assert len(numbers) > 12
    pd.testing.assert_frame_equal(table[numbers], printed[numbers], check_dtype=False)
    compared = read_table(tmp_path / "out" / "comparisons.csv").query(
        "reference == 'top_k' and domain == 'all'"
    )
    for name in ("difference", "low", "high", "p_corrected", "saved"):
        assert list(swept[f"top_k_{name}"]) == pytest.approx(list(compared[name]), rel=1e-6)
    assert list(swept["top_k_answer"]) == list(compared["answer"])


def test_sweep_fits_the_calibration_that_its_rules_need(demo: LoadedModel) -> None:
    words, documents = pages("calibration", 200, documents=30), pages("evaluation", 30)
    rules = {"mine": bhr.BenjaminiHochberg(0.3, max_k=6)}
    table = bhr.sweep(*demo, rules, [4], documents, words)
    (row,) = table[table["rule"] == "bh"].to_dict("records")
    assert (row["config_name"], row["knob_field"], row["budget"]) == ("mine@4", "alpha", 4)


@pytest.mark.parametrize("rule", [bhr.BenjaminiHochberg(), bhr.TopK(3)])
def test_generate_writes_what_the_model_generates_under_route(
    demo: LoadedModel, demo_calibration: bhr.Calibration, rule: bhr.Rule
) -> None:
    prompts = ["The old man walked down to", "It was a dark"]
    results = bhr.generate(*demo, prompts, rule, demo_calibration, max_new_tokens=8)
    together = bhr.generate(*demo, prompts, rule, demo_calibration, max_new_tokens=8, batch_size=2)
    assert [result.text for result in together] == [result.text for result in results]
    for prompt, result in zip(prompts, results, strict=True):
        inputs = demo.tokenizer(prompt, return_tensors="pt")
        with bhr.route(demo.model, rule, demo_calibration) as trace:
            output = demo.model.generate(
                **inputs, max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        assert result.text == demo.tokenizer.decode(new, skip_special_tokens=True)
        assert torch.equal(result.expert_counts, trace.expert_counts)


Call = Callable[[Any, Any], object]
api: Any = bhr  # what is called wrongly below mypy would find too


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: api.evaluate(m, t, ["bh"], ["text"]), "a rule must be an object .* got 'bh'"),
        (lambda m, t: api.evaluate(m, t, {"": bhr.TopK(4)}, ["text"]), "name must be a text"),
        (
            lambda m, t: api.evaluate(m, t, {3: bhr.TopK(4)}, ["text"]),
            "name must be a text .* got 3",
        ),
        (
            lambda m, t: api.evaluate(m, t, [bhr.TopK(4)] * 2, ["text"]),
            "'top_k_k-4' is given twice",
        ),
        (lambda m, t: api.evaluate(m, t, bhr.TopK(4), ["text"]), r"write \[rule\]"),
        (lambda m, t: api.evaluate(m, t, [], ["text"]), "rules must not be empty"),
        (lambda m, t: api.evaluate(m, t, [bhr.TopK(65)], ["text"]), "65"),
        (lambda m, t: api.evaluate(m, t, [bhr.TopK(4)], "text"), r"write \[text\]"),
        (
            lambda m, t: api.evaluate(m, t, [bhr.TopK(4)], [7]),
            "text 1 must be a string or a Document",
        ),
        (
            lambda m, t: api.evaluate(m, t, [bhr.BenjaminiHochberg()], ["text"]),
            r"needs a calibration, got None; .*rules=\[rule\]",
        ),
        (lambda m, t: api.sweep(m, t, [bhr.MinP(0.5)], 5, ["text"]), "list of numbers .* got 5"),
        (lambda m, t: api.sweep(m, t, [bhr.MinP(0.5)], ["x"], ["text"]), "list of numbers"),
        (lambda m, t: api.sweep(m, t, [bhr.MinP(0.5)], [9], ["text"]), "9"),
        (lambda m, t: api.sweep(m, t, [bhr.TopK(4)], [5], ["text"]), "no rule is left to sweep"),
        (
            lambda m, t: api.sweep(m, t, [bhr.MinP(0.5), bhr.MinP(0.2)], [5], ["text"]),
            "differ only in share",
        ),
        (
            lambda m, t: api.sweep(m, t, [bhr.MinP(0.5)], [5], pages("calibration", 90)),
            "share a passage with the calibration text",
        ),
        (lambda m, t: api.generate(m, t, "one text", bhr.TopK(4)), r"write \[prompt\]"),
        (lambda m, t: api.generate(m, t, [""], bhr.TopK(4)), "prompt 1 .* gives no token"),
        (lambda m, t: api.generate(m, t, ["text"], "top_k"), "a rule must be an object"),
        (
            lambda m, t: api.generate(m, t, ["text"], bhr.TopK(4), batch_size=0),
            "batch_size must be .* got 0",
        ),
        (
            lambda m, t: api.generate(m, t, ["text"], bhr.TopK(4), max_new_tokens=0),
            "max_new_tokens must be a whole number of at least 1, got 0",
        ),
        (
            lambda m, t: api.generate(m, t, ["text"], bhr.TopK(4), max_new_tokens=5000),
            "generate fewer tokens",
        ),
    ],
)
def test_a_mistake_is_one_sentence(demo: LoadedModel, call: Call, message: str) -> None:
    with pytest.raises(bhr.InputError, match=message) as caught:
        call(*demo)
    assert "\n" not in str(caught.value)


def test_text_that_was_calibrated_on_is_not_scored(
    demo: LoadedModel, demo_calibration: bhr.Calibration
) -> None:
    documents = bhr.packaged_documents("calibration")[:2]
    with pytest.raises(bhr.InputError, match="share a passage with the text of the calibration"):
        bhr.evaluate(*demo, [bhr.BenjaminiHochberg()], documents, demo_calibration)


def test_every_rule_of_the_catalog_is_importable() -> None:
    assert all(getattr(bhr, rule.__name__) is rule for rule in RULES.values())
