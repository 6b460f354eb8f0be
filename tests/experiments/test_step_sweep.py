"""Sweeps at equal distinct experts per decode step."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

import bh_routing as bhr
from bh_routing.analysis.quality import QualityOptions
from bh_routing.engine.texts import packaged_documents
from bh_routing.engine.windows import TokenizedDocument, cut_pieces
from bh_routing.errors import InputError
from bh_routing.experiments.search import KnobSearch, check_fractions
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.specs import SweepSpec, make_spec
from bh_routing.experiments.step_sweep import is_reference
from bh_routing.experiments.sweep import sweep
from bh_routing.experiments.variants import parse_variants
from bh_routing.models import LoadedModel
from bh_routing.report.sweep import conclude_sweep
from bh_routing.rules import TopK, TopP

FEW = QualityOptions(resamples=200, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three rules, one of each kind: whole, by step, per token."""
    output = tmp_path_factory.mktemp("sweep")
    spec = make_spec(
        SweepSpec, model="demo", device="cpu", output=output, cost="distinct", decode_batch=4,
        budgets=[0.7], rules=["oea", "expert_budget:by=gate_mass", "top_p"], tokens=1_700,
    )  # fmt: skip
    sweep(spec)
    conclude_sweep(output, FEW)
    return output


def test_points_come_near_the_budget_and_whole_numbers_around_it(folder: Path) -> None:
    points = pd.read_csv(folder / "points.csv").set_index("config_name")
    reads = points["mean_distinct_experts"] / points["mean_distinct_experts"]["topk_8"]
    assert reads[["expert_budget-gate_mass@0.7", "top_p@0.7"]].between(0.65, 0.75).all()
    oea = reads[points["rule"] == "oea"]
    assert oea.min() < 0.7 < oea.max()
    assert (points["mean_experts"] > 0).all()


def test_rules_are_compared_with_each_reference_at_their_own_reads(folder: Path) -> None:
    compared = pd.read_csv(folder / "comparisons.csv").query("domain == 'all'")
    assert set(compared["cost"]) == {"mean_distinct_experts"}
    assert set(compared["reference"]) == {"top_k", "oea", "expert_budget"}
    row = compared.query("config_name == 'top_p@0.7' and reference == 'top_k'").iloc[0]
    assert math.isfinite(row["difference"] + row["p_corrected"])


def test_the_report_states_the_batch(folder: Path) -> None:
    text = (folder / "SWEEP.md").read_text(encoding="utf-8")
    assert "emulated decode steps of 4 sequences" in text
    assert "OEA" in text


def test_a_second_call_scores_nothing_again(folder: Path) -> None:
    before = (folder / "quality.jsonl").read_bytes()
    spec = make_spec(
        SweepSpec, model="demo", device="cpu", output=folder, cost="distinct", decode_batch=4,
        budgets=[0.7], rules=["oea", "expert_budget:by=gate_mass", "top_p"], tokens=1_700,
    )  # fmt: skip
    sweep(spec)
    assert (folder / "quality.jsonl").read_bytes() == before


@pytest.mark.parametrize("values", [{"cost": "distinct"}, {"decode_batch": 4}])
def test_distinct_experts_and_steps_need_each_other(tmp_path: Path, values: dict[str, str]) -> None:
    with pytest.raises(InputError, match="need each other"):
        make_spec(SweepSpec, output=tmp_path, **values)


@pytest.mark.parametrize("budget", [0.0, 1.5, 5, math.nan])
def test_a_budget_of_distinct_experts_is_a_fraction(budget: float) -> None:
    with pytest.raises(InputError, match="must be a fraction"):
        check_fractions([0.5, budget])


def test_a_fraction_of_one_is_the_models_own_top_k(demo: LoadedModel) -> None:
    search = KnobSearch(*demo, packaged_documents("calibration"), None, 600, decode_batch=4)
    assert search.cost(TopK(8)) == 1
    assert search.cost(TopK(2)) < search.cost(TopK(4)) < 1
    (top_p,) = parse_variants(["top_p"])
    (setting,) = search.find([Goal(variant=top_p, budget=0.8)])
    assert setting.cost == pytest.approx(0.8, rel=0.02)
    assert search.cost(setting.rule) == pytest.approx(0.8, rel=0.1)


def test_the_python_door_compares_in_steps_too(demo: LoadedModel) -> None:
    texts = packaged_documents("evaluation")[:5]
    frame = bhr.sweep(
        *demo, [TopP(0.5)], [0.7], texts, max_tokens=300, decode_batch=4, cost="distinct"
    )
    own = frame[frame["config_name"] == "topk_8"].iloc[0]
    assert own["mean_distinct_experts"] > 20
    with pytest.raises(InputError, match="need each other"):
        bhr.sweep(*demo, [TopP(0.5)], [0.7], texts, decode_batch=4)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("bh_drop", True),
        ("bh_drop:scope=step,statistic=sensitivity", False),
        ("expert_budget:by=gate_mass", True),
        ("expert_budget:by=fisher_mass", False),
        ("top_p", False),
    ],
)
def test_references_are_decided_per_token_or_by_gate_mass(text: str, is_one: bool) -> None:
    (variant,) = parse_variants([text])
    assert is_reference(variant) is is_one


def test_pieces_join_to_the_document() -> None:
    document = TokenizedDocument(key="a", name="a", cluster="c", domain="x", ids=list(range(11)))
    pieces = list(cut_pieces([document], 4))
    assert [len(piece.ids) for piece in pieces] == [3, 4, 4]
    assert [i for piece in pieces for i in piece.ids] == document.ids
    assert len({piece.key for piece in pieces}) == 3
