"""Where BH configurations lose to static top-k, a run scores `bh_drop` and states the command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bh_routing.analysis.results import load_results
from bh_routing.cli.main import main
from bh_routing.engine.texts import packaged_documents
from bh_routing.experiments.configurations import parse_rule, rule_text
from bh_routing.experiments.run import run
from bh_routing.models.load import LoadedModel
from bh_routing.nulls.calibration import Calibration
from bh_routing.report.conclusion import conclude_run
from bh_routing.results.records import REPORT_HTML, REPORT_MD, RUN_JSON
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import make_rule
from tests.experiments.conftest import TINY_PROMPTS, MakeTinySpec
from tests.rules.test_conformance import EXAMPLES

LOSING: dict[str, dict[str, Any]] = {
    "topk_8": {"method": "topk", "k": 8},
    "low": {"method": "bh", "alpha": 0.05, "null": "gaussian"},
    "high": {"method": "bh", "alpha": 0.3, "null": "gaussian"},
}


def write_text(path: Path, documents: list[str]) -> Path:
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture
def scored(tmp_path: Path) -> dict[str, Any]:
    """Changes to a tiny spec that score a few hundred tokens."""
    documents = [document.text for document in packaged_documents("evaluation")[:12]]
    text = write_text(tmp_path / "text.txt", documents)
    few = {"prompts": TINY_PROMPTS[:1], "token_traces": 0}
    return {"no_eval": False, "texts": [str(text)], "tokens": 600, "configs": LOSING, **few}


def document_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / RUN_JSON).read_text())
    return document


def test_bh_drop_is_scored_where_bh_loses_and_its_command_runs(
    tiny_spec: MakeTinySpec, scored: dict[str, Any], loaded_demo: LoadedModel
) -> None:
    spec = tiny_spec(**scored)
    outcome = run(spec, lambda folder, attempt: conclude_run(folder, attempt))
    assert (outcome.exit_code, {r.config_name for r in outcome.records}) == (0, set(LOSING))
    found = document_of(spec.output)["alternatives"]
    assert len(found["rules"]) == 2 and found["skipped"] is None

    quality = load_results(spec.output).quality
    means = {}
    for entry in found["rules"]:
        own = [r for r in quality if r.config_name == entry["config_name"]]
        assert all(r.rule == entry["config"] for r in own)
        means[entry["budget"]] = sum(r.experts_sum for r in own) / sum(r.units for r in own)
    assert all(mean == pytest.approx(budget, rel=0.1) for budget, mean in means.items())

    report = (spec.output / REPORT_MD).read_text()
    assert "were added for comparison: the rule `bh_drop`" in report
    last = report.rpartition("## ")[2]
    assert last.startswith("Recommendation") and "    bh-routing run --model demo" in last
    page = (spec.output / REPORT_HTML).read_text()
    assert page.rfind("<section") == page.rfind('<section id="recommendation"')

    scores = (spec.output / "quality.jsonl").read_bytes()
    assert run(spec).exit_code == 0
    assert (spec.output / "quality.jsonl").read_bytes() == scores
    assert document_of(spec.output)["alternatives"] == found

    name = found["rules"][0]["config_name"]
    program, *arguments = shlex.split(found["commands"][name])
    assert program == "bh-routing" and main(arguments) == 0
    folder = Path(f"{spec.output}-bh_drop")
    assert document_of(folder)["baseline"] == "top_k_k-8"
    again = load_results(folder).quality
    losses = {r.document_key: r.nll_sum for r in again if r.rule["method"] == "bh_drop"}
    assert losses == {r.document_key: r.nll_sum for r in quality if r.config_name == name}


def test_nothing_is_added_where_no_bh_configuration_loses(
    tiny_spec: MakeTinySpec, scored: dict[str, Any], loaded_demo: LoadedModel
) -> None:
    static = {"topk_8": LOSING["topk_8"], "top_p": {"method": "top_p", "p": 0.7}}
    spec = tiny_spec(**scored | {"configs": static})
    assert run(spec).exit_code == 0
    found = document_of(spec.output)["alternatives"]
    assert (found["rules"], found["skipped"]) == ([], None)
    rules = {name: shlex.split(text)[4:-2] for name, text in found["commands"].items()}
    assert rules["top_p"] == ["--rule", "top_k:k=8", "--rule", "top_p:p=0.7", *rules["topk_8"][2:]]


@pytest.fixture
def without_gradients(loaded_demo: LoadedModel) -> Iterator[None]:
    """The demo model with a last layer that gives no gradients, as of some quantised models."""
    norm = loaded_demo.model.model.norm
    hook = norm.register_forward_hook(lambda module, inputs, output: output.detach())
    yield
    hook.remove()


def test_a_model_without_gradients_says_why_nothing_is_added(
    tiny_spec: MakeTinySpec, scored: dict[str, Any], without_gradients: None
) -> None:
    spec = tiny_spec(**scored)
    outcome = run(spec, lambda folder, attempt: conclude_run(folder, attempt))
    assert outcome.exit_code == 0
    assert "give no gradients" in document_of(spec.output)["alternatives"]["skipped"]
    assert "was not scored for comparison: this model" in (spec.output / REPORT_MD).read_text()


def test_text_that_bh_drop_would_be_calibrated_on_adds_nothing(
    tiny_spec: MakeTinySpec, scored: dict[str, Any], tmp_path: Path, loaded_demo: LoadedModel
) -> None:
    documents = [document.text for document in packaged_documents("calibration")[:12]]
    text = write_text(tmp_path / "shared.txt", documents)
    spec = tiny_spec(**scored | {"texts": [str(text)]})
    assert run(spec).exit_code == 0
    assert "share a passage" in document_of(spec.output)["alternatives"]["skipped"]


def test_a_calibration_without_the_tables_of_bh_drop_adds_nothing(
    tiny_spec: MakeTinySpec,
    scored: dict[str, Any],
    tmp_path: Path,
    loaded_demo: LoadedModel,
    demo_calibration: Calibration,
) -> None:
    path = tmp_path / "background.safetensors"
    demo_calibration.save(path)
    bh = {"topk_8": LOSING["topk_8"], "bh": {"method": "bh", "alpha": 0.05}}
    spec = tiny_spec(**scored | {"calibration": path, "configs": bh})
    assert run(spec).exit_code == 0
    assert (
        "no table of null 'needed_by_loss'" in document_of(spec.output)["alternatives"]["skipped"]
    )


@pytest.mark.parametrize("rule", [r for rules in EXAMPLES.values() for r in rules], ids=str)
def test_a_rules_text_gives_the_rule_again(rule: Rule) -> None:
    text = rule_text(rule)
    if text is None:
        assert any(isinstance(value, tuple) for value in vars(rule).values())
    else:
        assert make_rule(parse_rule(text)[1]) == rule
