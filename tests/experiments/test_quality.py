"""Scoring goes on where it stopped, and refuses what it must not mix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bh_routing.analysis.quality import analyze_quality
from bh_routing.analysis.quality_row import read_quality
from bh_routing.engine.texts import Document
from bh_routing.errors import ExperimentError, InputError, ResultsError
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.identity import RunIdentity
from bh_routing.experiments.quality import QualityLedger, score_missing, static_references
from bh_routing.experiments.quality_text import QualityText, prepare_text
from bh_routing.models import LoadedModel, describe_model, find_routers
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import QUALITY_JOURNAL, QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.fixed import TopK
from bh_routing.rules.mass import TopP

DOCUMENTS = [
    Document(f"d{i}", f"Chapter {i}. The sea was calm and the sky was grey. " * 3, f"c{i}", "x")
    for i in range(3)
]
IDENTITY = RunIdentity(
    model="demo", model_fingerprint="f" * 64, dtype="float32", device_type="cpu", max_tokens=4
)
RULES: dict[str, Rule] = {"topk_8": TopK(k=8), "topk_4": TopK(k=4)}


@pytest.fixture(scope="module")
def text(demo: LoadedModel) -> QualityText:
    return prepare_text(demo.tokenizer, describe_model(demo.model), DOCUMENTS, max_tokens=90)


def score_into(
    folder: Path, demo: LoadedModel, text: QualityText, rules: dict[str, Rule]
) -> list[QualityRecord]:
    with QualityLedger.resume(folder, text, IDENTITY) as ledger:
        return score_missing(Subject(*demo, None), ledger, rules)


def test_what_is_scored_is_not_scored_again(
    demo: LoadedModel, text: QualityText, tmp_path: Path
) -> None:
    first = score_into(tmp_path, demo, text, {"topk_8": TopK(k=8)})
    calls: list[int] = []
    router = find_routers(demo.model).sites[0].module
    handle = router.register_forward_hook(lambda *_: calls.append(1))
    both = score_into(tmp_path, demo, text, RULES)
    again = score_into(tmp_path, demo, text, RULES)
    handle.remove()
    assert both[:3] == first
    assert again == both
    assert len(calls) == 2  # the baseline and topk_4, once


def test_a_torn_last_line_costs_only_its_document(
    demo: LoadedModel, text: QualityText, tmp_path: Path
) -> None:
    whole = score_into(tmp_path, demo, text, RULES)
    journal = tmp_path / QUALITY_JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    resumed = score_into(tmp_path, demo, text, RULES)
    assert [(r.config_name, r.document) for r in resumed] == [
        (r.config_name, r.document) for r in whole
    ]
    assert resumed[-1].nll_sum == pytest.approx(whole[-1].nll_sum, rel=1e-6)


def test_a_redefined_configuration_is_scored_anew_and_the_file_keeps_both_rules_apart(
    demo: LoadedModel, text: QualityText, tmp_path: Path
) -> None:
    rules: list[dict[str, Rule]] = [{"a": TopK(k=4)}, {"a": TopK(k=3)}, {"a": TopK(k=4)}]
    runs = [score_into(tmp_path, demo, text, rule) for rule in rules]
    assert runs[0] == runs[2] != runs[1]
    found = read_quality(tmp_path / QUALITY_JOURNAL)
    assert [record.rule["k"] for record in found] == [4] * 3 + [3] * 3
    assert list(found) == [*runs[0], *runs[1]]


def test_a_renamed_configuration_is_not_scored_again_and_is_found_under_its_new_name(
    demo: LoadedModel, text: QualityText, tmp_path: Path
) -> None:
    first = score_into(tmp_path, demo, text, {"a": TopK(k=4)})
    calls: list[int] = []
    router = find_routers(demo.model).sites[0].module
    handle = router.register_forward_hook(lambda *_: calls.append(1))
    renamed = score_into(tmp_path, demo, text, {"b": TopK(k=4)})
    handle.remove()
    assert not calls
    assert renamed == [replace(record, config_name="b") for record in first]
    found = read_quality(tmp_path / QUALITY_JOURNAL)
    assert [r for r in found if r.config_name == "b"] == renamed


def test_documents_that_share_a_name_are_all_scored_and_shown_apart(
    demo: LoadedModel, tmp_path: Path
) -> None:
    documents = [document._replace(name="same") for document in DOCUMENTS]
    text = prepare_text(demo.tokenizer, describe_model(demo.model), documents, max_tokens=90)
    records = score_into(tmp_path, demo, text, RULES)
    assert [r.document for r in records] == ["same", "same#2", "same#3"] * 2
    assert sum(r.tokens for r in records) == 2 * 90
    table = analyze_quality(records)["rules"]
    assert [(row["documents"], row["tokens"]) for row in table] == [(3, 90)] * 2


def test_other_labels_of_the_same_text_are_taken_over_without_scoring_it_again(
    demo: LoadedModel, text: QualityText, tmp_path: Path
) -> None:
    score_into(tmp_path, demo, text, {"a": TopK(k=4)})
    documents = [document._replace(cluster="one book", domain="y") for document in DOCUMENTS]
    labelled = prepare_text(demo.tokenizer, describe_model(demo.model), documents, max_tokens=90)
    records = score_into(tmp_path, demo, labelled, {"a": TopK(k=4)})
    assert {(r.cluster, r.domain) for r in records} == {("one book", "y")}
    assert list(read_quality(tmp_path / QUALITY_JOURNAL)) == records


def test_a_reference_whose_usual_name_stands_for_another_rule_gets_another_one(
    demo: LoadedModel, text: QualityText, tmp_path: Path
) -> None:
    rules: dict[str, Rule] = {"topk_4": TopK(k=3), "static_4": TopK(k=6), "four": TopP(p=0.6)}
    records = score_into(tmp_path, demo, text, rules)
    fake = [replace(r, experts_sum=int(4.5 * r.units)) for r in records]
    names = {rule.k: name for name, rule in static_references(rules, fake).items()}
    assert names == {4: "static_static_4", 5: "topk_5"}


@pytest.mark.parametrize(
    "change", [{"max_tokens": 60}, {"window": 32}, {"window": 64, "stride": 8}]
)
def test_scores_of_another_setting_are_refused_and_left_alone(
    demo: LoadedModel, text: QualityText, tmp_path: Path, change: dict[str, int]
) -> None:
    score_into(tmp_path, demo, text, {"topk_8": TopK(k=8)})
    before = (tmp_path / QUALITY_JOURNAL).read_bytes()
    other = prepare_text(
        demo.tokenizer, describe_model(demo.model), DOCUMENTS, **({"max_tokens": 90} | change)
    )
    with pytest.raises(ResultsError, match=f"{next(iter(change))}: .* there, .* now"):
        QualityLedger.resume(tmp_path, other, IDENTITY)
    assert (tmp_path / QUALITY_JOURNAL).read_bytes() == before


def test_an_edited_score_is_refused(demo: LoadedModel, text: QualityText, tmp_path: Path) -> None:
    score_into(tmp_path, demo, text, {"topk_8": TopK(k=8)})
    journal = tmp_path / QUALITY_JOURNAL
    journal.write_text(journal.read_text().replace('"same_top1":', '"same_top1":1', 1))
    with pytest.raises(ResultsError, match="checksum"):
        QualityLedger.resume(tmp_path, text, IDENTITY)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 2000}, "window must be from 1 to the model's context 1024, got 2000"),
        ({"window": 8, "stride": 9}, "stride must be from 1 to the window 8, got 9"),
    ],
)
def test_windows_that_do_not_fit_are_named(
    demo: LoadedModel, options: dict[str, int], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        prepare_text(
            demo.tokenizer, describe_model(demo.model), DOCUMENTS, max_tokens=None, **options
        )


def test_static_references_stand_on_both_sides_of_every_mean(
    demo: LoadedModel, text: QualityText, demo_calibration: Calibration, tmp_path: Path
) -> None:
    rules: dict[str, Rule] = {"topk_8": TopK(k=8), "bh": BenjaminiHochberg(alpha=0.05)}
    with QualityLedger(tmp_path, text, IDENTITY) as ledger:
        records = score_missing(Subject(*demo, demo_calibration), ledger, rules)
    bh = [r for r in records if r.config_name == "bh"]
    mean = sum(r.experts_sum for r in bh) / sum(r.units for r in bh)
    low = int(mean)
    assert static_references(rules, records) == {
        f"topk_{low}": TopK(k=low),
        f"topk_{low + 1}": TopK(k=low + 1),
    }


@contextmanager
def logits_filled(demo: LoadedModel, token: int, value: float) -> Iterator[None]:
    """The demo model with one token's logit fixed, as where a vocabulary is padded or broken."""
    index = torch.tensor([token])
    handle = demo.model.lm_head.register_forward_hook(
        lambda _, __, logits: logits.index_fill(-1, index, value)
    )
    try:
        yield
    finally:
        handle.remove()


def test_a_masked_token_is_scored_and_read_back(
    demo: LoadedModel, text: QualityText, tmp_path: Path
) -> None:
    for name in ("plain", "masked"):
        (tmp_path / name).mkdir()
    plain = score_into(tmp_path / "plain", demo, text, RULES)
    with logits_filled(demo, demo.model.config.vocab_size - 1, -math.inf):
        masked = score_into(tmp_path / "masked", demo, text, RULES)
    for ours, theirs in zip(masked, plain, strict=True):
        assert ours.kl_sum == pytest.approx(theirs.kl_sum, rel=1e-3)
    assert read_quality(tmp_path / "masked" / QUALITY_JOURNAL) == tuple(masked)
    QualityLedger.resume(tmp_path / "masked", text, IDENTITY)


@pytest.mark.parametrize(("value", "match"), [(-math.inf, "probability 0"), (math.nan, "NaN")])
def test_an_infinite_or_undefined_loss_is_an_error_and_never_written(
    demo: LoadedModel, text: QualityText, tmp_path: Path, value: float, match: str
) -> None:
    target = text.documents[0].ids[5]
    with logits_filled(demo, target, value), pytest.raises(ExperimentError, match=match):
        score_into(tmp_path, demo, text, RULES)
    assert read_quality(tmp_path / QUALITY_JOURNAL) == ()
