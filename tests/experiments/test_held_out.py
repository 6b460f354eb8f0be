"""Text that rules were fitted on is never scored, by whatever way it comes in."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bh_routing.engine.texts import (
    Document,
    find_shared_passages,
    packaged_documents,
    passage_hashes,
    text_sha256,
)
from bh_routing.errors import InputError
from bh_routing.experiments.calibrating import check_held_out, check_overlap
from bh_routing.experiments.configurations import make_rules
from bh_routing.experiments.evaluate import evaluate
from bh_routing.experiments.run import run
from bh_routing.experiments.specs import EvaluateSpec, RunSpec, SweepSpec, make_spec
from bh_routing.experiments.sweep import sweep
from bh_routing.nulls.calibration import Calibration
from tests.experiments.conftest import MakeTinySpec

BH = {"bh": {"method": "bh", "alpha": 0.2}}


def half(document: Document) -> Document:
    return document._replace(text=document.text[: len(document.text) // 2])


def inside_another(document: Document) -> Document:
    words = document.text.split()
    middle = " ".join(words[100:140]).upper().replace(",", " --")
    return document._replace(text=f"A text of its own begins here. {middle}\nAnd ends here.")


@pytest.mark.parametrize("part_of", [half, inside_another])
def test_a_part_of_a_document_is_found_whatever_its_name_and_punctuation(
    part_of: Callable[[Document], Document],
) -> None:
    scored = packaged_documents("evaluation")[:5]
    calibration = [part_of(document)._replace(name="other") for document in scored[2:4]]
    with pytest.raises(InputError, match=r"2 of the 5 documents .* the first is 'evaluation-2'"):
        check_overlap(scored, calibration)


def test_a_part_is_found_in_a_script_without_spaces_too() -> None:
    sentences = [
        "河水很慢地流过那座古老的石桥下面",
        "没有人知道它从哪里来又往哪里去",
        "老人每天早上都在那里等船",
    ]
    scored = [Document("a", "。".join(sentences) + "。", "a", "x")]
    check_overlap(scored, [Document("b", "今天的天气很好我们一起去公园散步吧" * 3, "b", "x")])
    with pytest.raises(InputError, match="1 of the 1 documents"):
        check_overlap(scored, [Document("b", "别的话。" + "。".join(sentences[:2]), "b", "x")])


def test_a_document_too_short_for_a_passage_is_found_as_a_whole() -> None:
    scored = [Document("a", "Snow fell on the harbour all night.", "a", "x")]
    check_overlap(scored, [Document("b", "Snow fell on the harbour all day.", "b", "x")])
    with pytest.raises(InputError, match="snow fell on the harbour"):
        check_overlap(scored, [Document("b", "Snow fell, on the harbour -- all night!", "b", "x")])


def test_the_packaged_texts_share_no_passage() -> None:
    check_overlap(packaged_documents("evaluation"), packaged_documents("calibration"))


def write(path: Path, documents: list[Document]) -> Path:
    path.write_text("\n<|endoftext|>\n".join(d.text for d in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def fitted_on_scored(
    demo_calibration: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A calibration that remembers a part of the evaluation text."""

    text = half(packaged_documents("evaluation")[7]).text
    passages = torch.from_numpy(passage_hashes([text]))
    calibration = dataclasses.replace(demo_calibration, passages=passages)
    return calibration.save(tmp_path_factory.mktemp("fitted") / "fitted.safetensors")


def start(command: str, spec: RunSpec) -> None:
    values = {
        name: getattr(spec, name)
        for name in EvaluateSpec.model_fields
        if name in spec.model_fields_set
    }
    if command == "run":
        run(spec)
    elif command == "evaluate":
        evaluate(make_spec(EvaluateSpec, **values), lambda _: {})
    else:
        shared = {name: values[name] for name in SweepSpec.model_fields if name in values}
        sweep(make_spec(SweepSpec, **shared, rules=["top_p"], budgets=[4]))


@pytest.mark.parametrize("command", ["run", "evaluate", "sweep"])
@pytest.mark.parametrize("way", ["calibration", "calibration_texts"])
def test_every_command_that_scores_refuses_what_was_fitted_on_scored_text(
    command: str, way: str, fitted_on_scored: Path, tiny_spec: MakeTinySpec, tmp_path: Path
) -> None:
    documents = [half(packaged_documents("evaluation")[7])]
    given = {
        "calibration": fitted_on_scored,
        "calibration_texts": [write(tmp_path / "halves.txt", documents)],
    }
    spec = tiny_spec(configs=BH, no_eval=False, **{way: given[way]})
    with pytest.raises(InputError, match=r"1 of the 42 documents .* 'evaluation-7'"):
        start(command, spec)
    assert not spec.output.exists() or not list(spec.output.glob("*.jsonl"))


def test_text_that_nothing_is_fitted_on_may_be_scored(
    fitted_on_scored: Path, tmp_path: Path
) -> None:
    documents = packaged_documents("evaluation")
    text = write(tmp_path / "same.txt", documents)
    fixed = {"topk_4": {"method": "topk", "k": 4}}
    for way, path in (("calibration", fitted_on_scored), ("calibration_texts", text)):
        spec = make_spec(RunSpec, configs=fixed, **{way: path if way == "calibration" else [path]})
        check_held_out(spec, make_rules(spec.configs), documents)


def test_a_budget_is_searched_on_held_out_text_though_the_calibration_is_a_file(
    demo_calibration: Calibration, tmp_path: Path
) -> None:
    file = demo_calibration.save(tmp_path / "calibration.safetensors")
    spec = make_spec(RunSpec, configs=BH, calibration=file, budget=4.0)
    rules = make_rules(spec.configs, spec.budget)
    check_held_out(spec, rules, packaged_documents("evaluation"))
    with pytest.raises(InputError, match="21 of the 21 documents"):
        check_held_out(spec, rules, packaged_documents("calibration"))


def test_of_a_calibration_without_passages_the_whole_text_is_compared(
    demo_calibration: Calibration, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documents = packaged_documents("evaluation")
    sha256 = text_sha256([document.text for document in documents])
    nothing = torch.empty(0, dtype=torch.int64)
    for name, text in (("same", sha256), ("other", demo_calibration.text_sha256)):
        older = dataclasses.replace(demo_calibration, passages=nothing, text_sha256=text)
        older.save(tmp_path / f"{name}.safetensors")
    spec = make_spec(RunSpec, configs=BH, calibration=tmp_path / "same.safetensors")
    with pytest.raises(InputError, match="42 of the 42 documents"):
        check_held_out(spec, make_rules(spec.configs), documents)
    spec = make_spec(RunSpec, configs=BH, calibration=tmp_path / "other.safetensors")
    with caplog.at_level(logging.WARNING):
        check_held_out(spec, make_rules(spec.configs), documents)
    assert "can't be checked" in caplog.text


def test_a_calibration_remembers_the_text_that_it_read(demo_calibration: Calibration) -> None:
    passages = demo_calibration.passages.numpy()
    assert 1_000 < len(passages) < 10_000
    calibration = packaged_documents("calibration")

    assert len(find_shared_passages(calibration, passages)) == 21
    assert not find_shared_passages(packaged_documents("evaluation"), passages)
