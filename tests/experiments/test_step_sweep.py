"""Sweeps at equal distinct experts per decode step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import bh_routing as bhr
from bh_routing.analysis.quality import QualityOptions
from bh_routing.analysis.sweep_records import read_sweep
from bh_routing.engine.texts import Document, packaged_documents
from bh_routing.engine.windows import TokenizedDocument, cut_pieces
from bh_routing.errors import InputError
from bh_routing.experiments.search import TOLERANCE, KnobSearch, check_fractions
from bh_routing.experiments.settings import Goal
from bh_routing.experiments.specs import SweepSpec, make_spec
from bh_routing.experiments.step_sweep import default_rules, is_reference
from bh_routing.experiments.sweep import sweep
from bh_routing.experiments.variants import parse_variants
from bh_routing.models import LoadedModel, find_routers
from bh_routing.report.sweep import conclude_sweep
from bh_routing.rules import ExpertBudget, OpportunisticActivation, TopK, TopP
from bh_routing.rules.step import StepRule

FEW = QualityOptions(resamples=200, seed=0)
RULES = ["oea:refill=12", "expert_budget:by=gate_mass", "top_p"]


@pytest.fixture(scope="module")
def source() -> list[Document]:
    """Short calibration text, since none of the rules needs a calibration."""
    return [
        document._replace(text=document.text[:500])
        for document in packaged_documents("calibration")[:20]
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, source: list[Document]) -> Path:
    """A sweep of three rules, one of each kind: whole, by step, per token."""
    output = tmp_path_factory.mktemp("sweep")
    lines = [json.dumps({"text": document.text}) + "\n" for document in source]
    (output / "source.jsonl").write_text("".join(lines), encoding="utf-8")
    sweep(spec_of(output))
    conclude_sweep(output, FEW)
    return output


def spec_of(folder: Path) -> SweepSpec:
    return make_spec(
        SweepSpec, model="demo", device="cpu", output=folder, cost="distinct", decode_batch=4,
        budgets=[0.7], rules=RULES, tokens=1_700, window=200,
        calibration_texts=[str(folder / "source.jsonl")],
    )  # fmt: skip


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


def test_records_know_their_draw_of_companions(folder: Path) -> None:
    draws = [record.draw for record in read_sweep(folder).records]
    assert set(draws) == {0, 1}
    assert draws.count(0) == draws.count(1)


def test_the_report_states_the_batch(folder: Path) -> None:
    text = (folder / "SWEEP.md").read_text(encoding="utf-8")
    assert "emulated decode steps of 4 sequences" in text
    assert "OEA" in text


def test_a_second_call_scores_nothing_again(folder: Path) -> None:
    before = (folder / "quality.jsonl").read_bytes()
    sweep(spec_of(folder))
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
    (gate_mass,) = parse_variants(["expert_budget:by=gate_mass"])
    whole = search.find([Goal(variant=gate_mass, budget=b) for b in (0.6, 0.62)])
    assert max(abs(s.cost / s.goal.budget - 1) for s in whole) > TOLERANCE
    assert [s.unreachable for s in whole] == [None] * 2


def test_budgets_that_one_whole_number_meets_are_measured_in_one_pass(demo: LoadedModel) -> None:
    search = KnobSearch(*demo, packaged_documents("calibration"), None, 600, decode_batch=4)
    (oea,) = parse_variants(["oea"])
    budget = search.cost(OpportunisticActivation(4))
    calls: list[int] = []
    handle = (
        find_routers(demo.model).sites[0].module.register_forward_hook(lambda *_: calls.append(1))
    )
    found, passes = [], []
    for budgets in ([budget], [budget, budget + 0.001, budget - 0.001]):
        calls.clear()
        found = search.find([Goal(variant=oea, budget=b) for b in budgets])
        passes.append(len(calls))
    handle.remove()
    assert passes[0] == passes[1]
    assert [s.knob for s in found] == [4, 4, 4]
    assert len({s.cost for s in found}) == 1


@pytest.mark.parametrize(("most_slots", "refill"), [(64, 16), (12, 12), (8, 8)])
def test_default_rules_are_refilled_as_far_as_the_router_can_propose(
    most_slots: int, refill: int, demo: LoadedModel
) -> None:
    routers = find_routers(demo.model)
    facts = replace(routers.sites[0].facts, most_slots=most_slots)
    limited = replace(routers, sites=(replace(routers.sites[0], facts=facts),))
    rules = [variant.anywhere() for variant in parse_variants(default_rules(limited))]
    refills = [rule.refill for rule in rules if isinstance(rule, StepRule)]
    assert len(rules) == 8
    assert refills.count(refill) == 5
    for rule in rules:
        rule.check(num_experts=64, model_top_k=8)


def test_python_compares_in_steps_with_the_references_of_the_command_line(
    demo: LoadedModel, folder: Path, source: list[Document]
) -> None:
    texts = packaged_documents("evaluation")
    rules = {
        "oea-refill-12": OpportunisticActivation(1, refill=12),
        "expert_budget-gate_mass": ExpertBudget(9),
        "top_p": TopP(0.5),
    }
    frame = bhr.sweep(
        *demo, rules, [0.7], texts, source,
        max_tokens=1_700, window=200, decode_batch=4, cost="distinct",
    ).set_index("config_name")  # fmt: skip
    compared = pd.read_csv(folder / "comparisons.csv").query("domain == 'all'")
    by_reference = {
        reference: compared.query("reference == @reference").set_index("config_name")
        for reference in ("top_k", "oea", "expert_budget")
    }
    for reference, rows in by_reference.items():
        got = frame[f"{reference}_difference"].dropna()
        assert "top_p@0.7" in got.index
        assert list(got) == pytest.approx(list(rows["difference"].loc[got.index]), abs=1e-5)
    own = frame.loc["topk_8"]
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
