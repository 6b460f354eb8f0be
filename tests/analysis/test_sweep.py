"""The tables of a sweep, on scored documents whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from bh_routing.analysis.quality import QualityOptions, quality_table
from bh_routing.analysis.sweep import (
    ALL_RULES,
    REFERENCES,
    SweepTables,
    compare_points,
    comparison_definitions,
)
from bh_routing.analysis.sweep_equal_cost import EqualCost
from bh_routing.analysis.sweep_records import PointRow, align, read_sweep
from bh_routing.errors import ResultsError
from bh_routing.results.records import QUALITY_JOURNAL, RUN_JSON, column_definitions
from tests.analysis.scored import scored_documents
from tests.analysis.swept import (
    STATIC_LOSSES,
    point,
    usual_points,
    usual_records,
    with_experts,
    write_sweep,
)

FEW = QualityOptions(resamples=1500)
BOOKS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"), usual_points(), usual_records(BOOKS))


@pytest.fixture(scope="module")
def tables(folder: Path) -> SweepTables:
    return compare_points(read_sweep(folder), FEW)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> SweepTables:
    """A sweep with a stopped, an unreachable, an unscored and a far point, and an oracle."""
    records = usual_records(BOOKS)
    half = [r for r in records if r.config_name == "bh@5"][:10]
    for name, mean, loss in (("oracle_contribution@5", 5.05, 0.01), ("min_p@4", 4.09, 0.2)):
        own = scored_documents(name, delta=loss, spread=0.05 * loss, documents=BOOKS)
        records += with_experts(own, mean)
    records = [*(r for r in records if r.config_name != "bh@5"), *half]
    points = [
        *usual_points(),
        point("oracle_contribution", 5),
        point("min_p", 4),
        point("min_p", 6, unreachable="min_p keeps 4.1 at most.", knob=None),
        point("entropy", 4),
    ]
    return compare_points(
        read_sweep(write_sweep(tmp_path_factory.mktemp("odd"), points, records)), FEW
    )


def row(tables: SweepTables, name: str) -> PointRow:
    return next(row for row in tables.points if row.config_name == name)


def against(
    tables: SweepTables, name: str, reference: str = "top_k", domain: str = "all"
) -> EqualCost:
    return tables.found.get((name, reference, domain), EqualCost())


def test_the_first_columns_are_the_promised_ones() -> None:
    names = [f.name for f in fields(PointRow)]
    assert names[:9] == [
        "rule", "variant", "knob", "budget", "domain", "mean_experts", "delta_nll",
        "delta_nll_low", "delta_nll_high",
    ]  # fmt: skip
    definitions = {**column_definitions(PointRow), **comparison_definitions()}
    assert all(text.endswith(".") for text in definitions.values())


def test_a_comparison_is_one_row_per_point_reference_and_domain(tables: SweepTables) -> None:
    compared = tables.comparisons
    assert list(compared) == list(comparison_definitions())
    assert not compared.duplicated(["config_name", "reference", "domain"]).any()
    assert set(compared["domain"]) == {"all", "prose", "code"}
    assert set(compared["reference"]) == {"top_k", "top_p"}
    assert set(compared["cost"]) == {"mean_experts"}
    assert not set(REFERENCES) & set(compared)
    # Eight points against static top-k and the four of them that aren't top-p against top-p.
    assert len(compared) == 3 * (8 + 4)
    points = {own.config_name: own for own in tables.points}
    budgets = [points[name].budget for name in compared["config_name"]]
    assert list(compared["budget"]) == budgets


def test_static_top_k_has_rows_and_is_the_curve(tables: SweepTables) -> None:
    static = [row for row in tables.points if row.rule == "top_k"]
    assert [row.mean_experts for row in static] == list(STATIC_LOSSES)
    assert all(math.isnan(tables.against(row, "top_k").difference) for row in static)
    assert all(row.rank is None and not row.note for row in static)


def test_losses_are_those_of_the_quality_table(tables: SweepTables) -> None:
    for quality in quality_table(tables.sweep.records, FEW):
        own = row(tables, quality.config_name)
        for name in ("mean_experts", "delta_nll", "delta_nll_low", "kl_mean", "same_top1_share"):
            assert getattr(own, name) == getattr(quality, name)


def test_a_good_rule_wins_and_a_bad_one_does_not(tables: SweepTables) -> None:
    good, bad = against(tables, "bh_drop-block@5"), against(tables, "bh@5")
    line = STATIC_LOSSES[5] + 0.05 * (STATIC_LOSSES[6] - STATIC_LOSSES[5])
    assert good.at_mean == pytest.approx(line, rel=0.1)
    assert good.high < 0 < bad.low
    assert good.p_corrected < 0.05 > bad.p_corrected
    assert good.saved == pytest.approx(0.4, abs=0.1)
    won = [tables.domains_won(row(tables, n), "top_k") for n in ("bh_drop-block@5", "bh@5")]
    assert (won, tables.domain_names) == ([2, 0], ["code", "prose"])
    assert against(tables, "bh_drop-block@5", "top_p").high < 0


def test_every_test_is_counted_once(tables: SweepTables) -> None:
    # Eight points against static top-k but one past its end, four of them against top-p too.
    assert tables.num_tests == 7 + 4
    assert "nothing is extrapolated" in row(tables, "top_p@6").note


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> SweepTables:
    """Per-layer top-k at 5, with points at 6 and 4 that only lengthen its curve."""
    records = usual_records(BOOKS)
    for k in (6, 5, 4):
        loss = 0.4 * STATIC_LOSSES[k]
        own = scored_documents(f"per_layer_top_k@{k}", delta=loss, spread=0.05 * loss, seed=3,
                               documents=BOOKS)  # fmt: skip
        records += with_experts(own, k)
    points = [p for p in usual_points() if p["budget"] == 5] + [point("per_layer_top_k", 5)]
    beyond = [*(point("per_layer_top_k", k) for k in (6, 4)), point("top_p", 6)]
    folder = tmp_path_factory.mktemp("layered")
    return compare_points(
        read_sweep(write_sweep(folder, points, records, curve_points=beyond)), FEW
    )


def test_a_rule_can_beat_static_top_k_and_lose_to_shares_of_layers(layered: SweepTables) -> None:
    good = [against(layered, "bh_drop-block@5", name) for name in REFERENCES]
    assert [one.answer for one in good] == ["yes", "yes", "no"]
    line = 0.4 * (0.95 * STATIC_LOSSES[5] + 0.05 * STATIC_LOSSES[6])
    assert good[-1].at_mean == pytest.approx(line, rel=0.1)
    own = [against(layered, "bh_drop-block@5", name, "code") for name in REFERENCES]
    assert own[-1].difference > 0 > own[0].difference


def test_points_that_lengthen_a_curve_are_neither_tested_nor_winners(layered: SweepTables) -> None:
    assert row(layered, "per_layer_top_k@6").is_curve_only
    assert math.isnan(against(layered, "per_layer_top_k@6").difference)
    assert {winner.budget for winner in layered.winners} == {5}
    # Four points against static top-k, three against per-layer; against top-p, which begins at
    # 5.01 experts, two.
    assert layered.num_tests == 4 + 3 + 2


def test_a_mean_off_its_budget_is_flagged(odd: SweepTables) -> None:
    assert {row.config_name for row in odd.points if row.off_budget} == {"min_p@4"}


def test_domains_are_compared_at_their_own_mean(tables: SweepTables) -> None:
    own = {d.domain: d for d in tables.by_domain if d.config_name == "bh_drop-block@5"}
    assert own["prose"].mean_experts == pytest.approx(5.15, abs=1e-3)
    assert own["code"].mean_experts == pytest.approx(4.95, abs=1e-3)
    found = {domain: tables.against(one, "top_k") for domain, one in own.items()}
    assert found["code"].at_mean > found["prose"].at_mean
    assert all(one.difference < 0 for one in found.values())


def test_the_winner_of_a_budget_saves_most_of_static_top_ks_loss(tables: SweepTables) -> None:
    first = next(w for w in tables.winners if w.among == ALL_RULES and w.budget == 5)
    assert first.row == row(tables, "bh_drop-block@5")
    assert (row(tables, "bh_drop-block@5").rank, row(tables, "top_p@5").rank) == (1, 2)
    assert row(tables, "bh@5").rank == 3
    last = next(w for w in tables.winners if w.among == "bh_drop" and w.budget == 3)
    assert last.row is None


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict"),
    [
        (-0.03, -0.01, 0.01, "yes"),
        (-0.03, 0.01, 0.01, "undecided"),
        (-0.03, -0.01, 0.06, "undecided"),
        (0.01, 0.03, 0.01, "no"),
        (math.nan, math.nan, math.nan, "unknown"),
    ],
)
def test_a_win_needs_interval_and_corrected_p(
    low: float, high: float, p: float, verdict: str
) -> None:
    found = EqualCost(difference=(low + high) / 2, low=low, high=high, p_corrected=p)
    assert found.answer == verdict


def test_an_oracle_has_a_row_and_does_not_win(odd: SweepTables) -> None:
    assert against(odd, "oracle_contribution@5").saved > 0.8
    assert all(w.row is None or w.row.rule != "oracle_contribution" for w in odd.winners)


def test_unreachable_and_unfinished_points_stay_as_rows_with_reasons(odd: SweepTables) -> None:
    assert row(odd, "min_p@6").note == "min_p keeps 4.1 at most."
    assert math.isnan(row(odd, "min_p@6").knob)
    assert "Not scored yet" in row(odd, "entropy@4").note
    assert "all documents" in row(odd, "bh@5").note
    assert math.isfinite(row(odd, "bh@5").delta_nll)
    assert math.isnan(against(odd, "bh@5").difference)


def test_points_of_an_earlier_sweep_are_left_out(tmp_path: Path) -> None:
    records = [*usual_records(4), *with_experts(scored_documents("old@5", documents=4), 5.05)]
    folder = write_sweep(tmp_path, usual_points(), records)
    assert "old@5" not in align(read_sweep(folder).records).names


def test_few_books_use_students_t_and_none_of_it_needs_a_bootstrap(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, usual_points(), usual_records(documents=8))
    few = compare_points(read_sweep(folder), FEW)
    assert against(few, "bh_drop-block@5").high < 0
    assert "cluster t" in row(few, "bh_drop-block@5").note


def test_only_the_seed_moves_intervals(tables: SweepTables, folder: Path) -> None:
    again = compare_points(read_sweep(folder), FEW)
    assert repr((again.points, again.found)) == repr((tables.points, tables.found))
    other = against(compare_points(read_sweep(folder), FEW._replace(seed=1)), "bh@5")
    own = against(tables, "bh@5")
    assert other.difference == own.difference
    assert other.low != own.low


@pytest.mark.parametrize(
    "damage",
    [
        {"kind": "run"},
        {"schema_version": 99},
        {"sweep": {"points": [{"config_name": "x"}], "references": []}},
        {"sweep": {"points": [point("bh", 0)], "references": []}},
        {"sweep": None},
    ],
)
def test_a_folder_that_is_no_sweep_is_refused_by_name(
    tmp_path: Path, damage: dict[str, Any]
) -> None:
    folder = write_sweep(tmp_path, usual_points(), usual_records(documents=4), **damage)
    with pytest.raises(ResultsError, match=RUN_JSON):
        read_sweep(folder)


def test_a_folder_without_anything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="name a folder that a finished sweep or run wrote"):
        read_sweep(tmp_path)
    (tmp_path / RUN_JSON).write_text(json.dumps([]))
    with pytest.raises(ResultsError, match=QUALITY_JOURNAL):
        read_sweep(tmp_path)
    (tmp_path / QUALITY_JOURNAL).touch()
    with pytest.raises(ResultsError, match=RUN_JSON):
        read_sweep(tmp_path)
