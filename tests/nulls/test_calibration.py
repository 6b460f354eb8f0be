"""A calibration survives its file, and refuses what it can't serve."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.errors import CalibrationError
from bh_routing.models import LoadedModel
from bh_routing.nulls import Calibration, ReferenceTable
from bh_routing.nulls.contributions import Statistic

FINGERPRINT_OF_SCHEMA_2 = "5f5c33bd24215f052e4c903f65552caa91b8bb8034f8a2e1667a1512d0d9e054"

Tensors = dict[str, Tensor]
Header = dict[str, str]


def make(size: int = 2_000, **changes: Any) -> Calibration:
    generator = torch.Generator().manual_seed(0)
    facts: dict[str, Any] = {
        "tables": {
            null: tuple(
                ReferenceTable.from_scores(torch.randn(size, generator=generator)) for _ in range(2)
            )
            for null in ("background", "pooled")
        },
        "observed": {
            "pooled": tuple(torch.randn(5, 8, generator=generator) for _ in range(2)),
        },
        "passages": torch.tensor([-(2**62), 3, 2**62]),
        "model_fingerprint": "a" * 64,
        "num_layers": 2,
        "num_experts": 8,
        "model_top_k": 2,
        "num_tokens": 6_000,
        "num_documents": 30,
        "text_sha256": "b" * 64,
        "seed": 0,
        "table_capacity": 100_000,
        "created_at": "2024-01-01T00:00:00+00:00",
    }
    return Calibration(**(facts | changes))


def check(calibration: Calibration, **changes: Any) -> None:
    asked: dict[str, Any] = {
        "null": "background",
        "alpha": 0.10,
        "num_layers": 2,
        "num_experts": 8,
        "model_top_k": 2,
        "model_fingerprint": "a" * 64,
    }
    calibration.check(**(asked | changes))


def rewrite(path: Path, change: Callable[[Tensors, Header], None]) -> None:
    """Change a saved calibration behind its back."""
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, header)
    save_file(tensors, path, metadata=header)


def test_a_saved_calibration_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = make()
    loaded = Calibration.load(saved.save(tmp_path / "sub" / "calibration.safetensors"))
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.created_at == saved.created_at
    ours, theirs = saved.table("pooled", 1), loaded.table("pooled", 1)
    assert torch.equal(ours.sorted_scores_N, theirs.sorted_scores_N)
    assert torch.equal(saved.observed["pooled"][1], loaded.observed["pooled"][1])
    assert torch.equal(saved.passages, loaded.passages)
    for field in dataclasses.fields(Calibration):
        if field.name not in ("tables", "observed", "passages"):
            assert getattr(loaded, field.name) == getattr(saved, field.name)


def test_a_file_of_schema_2_is_still_read(tmp_path: Path) -> None:
    def make_older(tensors: Tensors, header: Header) -> None:
        facts = json.loads(header["facts"])
        del facts["observed"], tensors["passages"]
        header["facts"], header["schema"] = json.dumps(facts), "2"
        # Written by the version before, for this very calibration.
        header["fingerprint"] = FINGERPRINT_OF_SCHEMA_2

    path = make(observed={}).save(tmp_path / "calibration.safetensors")
    rewrite(path, make_older)
    assert Calibration.load(path).observed == {}


def test_saving_leaves_no_temporary_file(tmp_path: Path) -> None:
    make().save(tmp_path / "calibration.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.safetensors"]


def test_the_fingerprint_ignores_the_date_and_nothing_else() -> None:
    base = make()
    assert make(created_at="later").fingerprint == base.fingerprint
    others = [
        make(seed=1),
        make(num_tokens=6_001),
        make(model_fingerprint="c" * 64),
        make(size=1_999),
        make(passages=torch.tensor([3, 4])),
        make(tables={"background": base.tables["background"]}),
    ]
    prints = {other.fingerprint for other in others}
    assert len(prints) == len(others)
    assert base.fingerprint not in prints


def test_the_fingerprint_changes_with_one_score() -> None:
    base = make()
    scores_N = base.table("background", 0).sorted_scores_N.clone()
    scores_N[0] -= 1
    changed = (ReferenceTable(scores_N), base.table("background", 1))
    other = make(tables={**base.tables, "background": changed})
    assert other.fingerprint != base.fingerprint


def _not_sorted(tensors: Tensors, header: Header) -> None:
    tensors["background.0"] = tensors["background.0"].flip(0).contiguous()


def _not_finite(tensors: Tensors, header: Header) -> None:
    tensors["background.0"][-1] = float("nan")


def _lacking(tensors: Tensors, header: Header) -> None:
    del tensors["pooled.1"]


def _surplus(tensors: Tensors, header: Header) -> None:
    tensors["needed.0"] = torch.zeros(3)


def _half_precision(tensors: Tensors, header: Header) -> None:
    tensors["pooled.0"] = tensors["pooled.0"].half()


def _edited_score(tensors: Tensors, header: Header) -> None:
    tensors["pooled.0"][0] -= 1


def _edited_fact(tensors: Tensors, header: Header) -> None:
    header["facts"] = json.dumps(json.loads(header["facts"]) | {"num_tokens": 99_999})


def _wrong_type(tensors: Tensors, header: Header) -> None:
    header["facts"] = json.dumps(json.loads(header["facts"]) | {"num_layers": "two"})


def _no_json(tensors: Tensors, header: Header) -> None:
    header["facts"] = "{"


def _newer_schema(tensors: Tensors, header: Header) -> None:
    header["schema"] = "6"


def _observed_of_other_experts(tensors: Tensors, header: Header) -> None:
    tensors["observed.pooled.1"] = torch.zeros(5, 7)


def _observed_not_finite(tensors: Tensors, header: Header) -> None:
    tensors["observed.pooled.0"][0, 0] = float("inf")


def _edited_observed(tensors: Tensors, header: Header) -> None:
    tensors["observed.pooled.0"][0, 0] += 1


def _passages_out_of_order(tensors: Tensors, header: Header) -> None:
    tensors["passages"] = tensors["passages"].flip(0).contiguous()


def _passages_as_floats(tensors: Tensors, header: Header) -> None:
    tensors["passages"] = tensors["passages"].float()


def _without_passages(tensors: Tensors, header: Header) -> None:
    del tensors["passages"]


def _foreign(tensors: Tensors, header: Header) -> None:
    header["format"] = "pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_not_sorted, "'background.0' .* must be sorted"),
        (_not_finite, "'background.0' .* has NaN or infinite values"),
        (_lacking, "lacks the table 'pooled.1'"),
        (_surplus, "holds 1 tensors that its header doesn't name, such as 'needed.0'"),
        (_half_precision, "'pooled.0' .* must be float32, got F16"),
        (_edited_score, "was changed after it was written"),
        (_edited_fact, "was changed after it was written"),
        (_wrong_type, "unreadable facts .num_layers"),
        (_no_json, "unreadable facts"),
        (_newer_schema, "has schema '6', this version reads 2, 3, 4, 5;"),
        (_foreign, "no calibration of bh-routing"),
        (_observed_of_other_experts, r"'observed.pooled.1' .* shape \(T, 8\), got \(5, 7\)"),
        (_observed_not_finite, "'observed.pooled.0' .* must be finite"),
        (_edited_observed, "was changed after it was written"),
        (_passages_out_of_order, "'passages' .* must be ascending int64"),
        (_passages_as_floats, "'passages' .* must be ascending int64, got F32"),
        (_without_passages, "was changed after it was written"),
    ],
)
def test_a_changed_file_is_refused_in_one_sentence(
    tmp_path: Path, change: Callable[[Tensors, Header], None], message: str
) -> None:
    path = make().save(tmp_path / "calibration.safetensors")
    rewrite(path, change)
    with pytest.raises(CalibrationError, match=message) as caught:
        Calibration.load(path)
    assert "\n" not in str(caught.value)
    assert "run: bh_routing.calibrate(model" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "calibration.safetensors"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match="is no calibration or is damaged"):
        Calibration.load(path)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    path = make().save(tmp_path / "calibration.safetensors")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CalibrationError, match="damaged"):
        Calibration.load(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CalibrationError, match="does not exist or is no file"):
            Calibration.load(path)


def test_a_fitting_model_and_alpha_pass() -> None:
    check(make())
    check(make(), model_fingerprint=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 16}, "covers 2 layers, the model has 16; run: bh_routing.calibrate"),
        ({"num_experts": 64}, "covers 8 experts per layer, the model has 64"),
        ({"model_top_k": 8}, "covers 2 experts per token, the model has 8"),
        ({"model_fingerprint": "d" * 64}, "same shape, but other weights or settings"),
        ({"router_fingerprint": "d" * 64}, "made for routers unknown to an older version, this"),
        ({"null": "needed"}, "no table of null 'needed', only of: background, pooled"),
        ({"alpha": 0.05}, "hold 2000 scores and 3200 are needed; use alpha >= 0.08, or"),
    ],
)
def test_another_model_or_an_alpha_out_of_reach_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        check(make(), **changes)


def test_too_few_tokens_or_documents_are_refused() -> None:
    with pytest.raises(CalibrationError, match="4999 distinct tokens, at least 5000 are needed"):
        check(make(num_tokens=4_999))
    with pytest.raises(CalibrationError, match=r"19 documents, .* text of more documents"):
        check(make(num_documents=19))


def test_the_remedy_names_more_text_only_where_more_text_would_help() -> None:
    with pytest.raises(CalibrationError, match="or calibrate on more tokens of text"):
        check(make(), alpha=0.05)
    with pytest.raises(CalibrationError, match="larger tables"):
        check(make(table_capacity=2_000), alpha=0.05)


def test_the_resolution_is_the_smallest_alpha_that_passes() -> None:
    calibration = make()
    reach = calibration.resolution("background")
    check(calibration, alpha=reach)
    with pytest.raises(CalibrationError, match="out of the calibration's reach"):
        check(calibration, alpha=reach * 0.999)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_beyond_the_tables_is_refused(layer: int) -> None:
    with pytest.raises(CalibrationError, match="covers layers 0 to 1"):
        make().table("background", layer)


def test_tables_for_some_layers_only_are_refused() -> None:
    with pytest.raises(CalibrationError, match="has 2 tables of null 'background' for 3 layers"):
        make(num_layers=3)


@pytest.mark.parametrize("size", [1_999, 2_001, 3_333, 7_777])
def test_following_the_advised_alpha_works(size: int) -> None:
    calibration = make(size=size)
    with pytest.raises(CalibrationError) as caught:
        check(calibration, alpha=0.01)
    advised = re.search(r"alpha >= ([\d.]+),", str(caught.value))
    assert advised is not None
    check(calibration, alpha=float(advised[1]))


def test_the_fingerprint_of_a_nulls_tables_is_theirs_alone() -> None:
    both = make()
    alone = make(tables={"background": both.tables["background"]}, observed={}, seed=3)
    assert alone.table_fingerprints == {"background": both.table_fingerprints["background"]}
    assert both.table_fingerprints["background"] != both.table_fingerprints["pooled"]


def test_a_calibration_is_extended_by_what_it_lacks_and_keeps_the_rest() -> None:
    kept = make()
    fresh = make(
        tables={null: make(size=1_000).tables["pooled"] for null in ("pooled", "permutation")}
    )
    joined = kept.extended_by(fresh)
    assert joined.nulls == ("background", "permutation", "pooled")
    assert kept.table_fingerprints.items() < joined.table_fingerprints.items()
    assert joined.table_size("permutation") == 1_000


@pytest.mark.parametrize("change", [{"model_fingerprint": "c" * 64}, {"seed": 1}])
def test_calibrations_that_were_made_otherwise_are_not_joined(change: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=f"different {next(iter(change))}"):
        make().extended_by(make(**change))


def test_a_table_is_the_same_whichever_others_are_fitted_along(demo: LoadedModel) -> None:
    texts = [document.text for document in packaged_documents("calibration")[:4]]
    nulls = ("background", "background_studentized", "per_expert", "pooled", "needed")
    together = calibrate(*demo, texts, nulls=nulls, max_tokens=400).table_fingerprints
    for null in nulls:
        alone = calibrate(*demo, texts, nulls=[null], max_tokens=400).table_fingerprints
        assert alone == {null: together[null]}


def test_what_gradients_add_leaves_the_tables_without_them_alone(demo: LoadedModel) -> None:
    texts = [document.text for document in packaged_documents("calibration")[:2]]
    kept = calibrate(*demo, texts, nulls=["needed"], max_tokens=100)
    fresh = calibrate(*demo, texts, nulls=["needed_by_loss"], max_tokens=100)
    joined = kept.extended_by(fresh)
    assert joined.nulls == ("needed", "needed_by_loss")
    assert joined.table_fingerprints["needed"] == kept.table_fingerprints["needed"]
    assert joined.contributions is not None
    assert set(joined.contributions.scales) == set(get_args(Statistic))


def test_a_text_that_is_there_twice_counts_once(demo: LoadedModel) -> None:
    texts = [document.text for document in packaged_documents("calibration")[:2]]
    once, twice = (
        calibrate(*demo, given, nulls=["background"], max_tokens=100)
        for given in (texts, [*texts, texts[0]])
    )
    assert (once.num_documents, once.num_tokens) == (twice.num_documents, twice.num_tokens)
    assert once.fingerprint == twice.fingerprint
