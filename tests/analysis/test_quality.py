"""The quality table on scored documents whose truth is known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from statsmodels.stats.multitest import multipletests

from bh_routing.analysis.quality import QualityOptions, analyze_quality, quality_table
from bh_routing.analysis.quality_row import quality_definitions, read_quality
from bh_routing.analysis.results import load_results
from bh_routing.errors import InputError, ResultsError
from bh_routing.experiments.folder import render_header
from bh_routing.results.files import render_json
from bh_routing.results.records import QUALITY_JOURNAL, RESULTS_CSV, QualityRecord
from bh_routing.stats.bootstrap import cluster_bootstrap
from tests.analysis.scored import scored_documents

REQUIRED = (
    "config_name", "mean_experts", "tokens", "documents", "nll", "delta_nll", "delta_nll_low",
    "delta_nll_high", "perplexity_ratio", "kl_mean", "kl_p99", "same_top1_share",
)  # fmt: skip


@pytest.fixture(scope="module")
def records() -> list[QualityRecord]:
    return [
        *scored_documents("topk_8", delta=0, spread=0, kept=4),
        *scored_documents("mild", delta=0.003, spread=0.005, seed=1),
        *scored_documents("harsh", delta=0.05, seed=2),
    ]


def test_losses_are_per_token_and_not_per_document(records: list[QualityRecord]) -> None:
    row = quality_table(records)[1]
    mild = [r for r in records if r.config_name == "mild"]
    tokens = sum(r.tokens for r in mild)
    assert row.delta_nll == pytest.approx(sum(r.nll_sum - r.top_k_nll_sum for r in mild) / tokens)
    assert row.nll - row.top_k_nll == pytest.approx(row.delta_nll)
    assert row.perplexity_ratio == pytest.approx(math.exp(row.delta_nll))
    assert (row.tokens, row.documents, row.clusters) == (tokens, 42, 42)
    assert [row.mean_experts, row.rms_delta_p] == pytest.approx([2.0, 0.02])


def test_the_interval_is_the_bootstrap_over_documents(records: list[QualityRecord]) -> None:
    mild = [r for r in records if r.config_name == "mild"]
    expected = cluster_bootstrap(
        [r.nll_sum - r.top_k_nll_sum for r in mild],
        [r.tokens for r in mild],
        [r.cluster for r in mild],
    ).interval()
    row = quality_table(records)[1]
    assert row.delta_nll_low == pytest.approx(expected.low_R[0], rel=1e-9)
    assert row.delta_nll_high == pytest.approx(expected.high_R[0], rel=1e-9)
    assert row.perplexity_ratio_high == pytest.approx(math.exp(row.delta_nll_high))


def test_the_models_own_top_k_has_differences_of_exactly_zero(
    records: list[QualityRecord],
) -> None:
    row = quality_table(records)[0]
    zeros = (row.delta_nll, row.delta_nll_low, row.delta_nll_high, row.kl_mean, row.kl_p99)
    assert zeros == (0.0,) * 5
    assert (row.is_reference, row.non_inferior, row.perplexity_ratio_high) == (True, True, 1.0)
    assert math.isnan(row.p_corrected)


def test_verdicts_name_what_the_data_can_say() -> None:
    few = quality_table(scored_documents("x", delta=0.0105, spread=0.03, documents=24))
    assert few[0].verdict == "undecided"
    assert not few[0].non_inferior
    harsh = quality_table(scored_documents("x", delta=0.05))
    mild = quality_table(scored_documents("x", delta=0.002, spread=0.005))
    assert (harsh[0].verdict, mild[0].verdict) == ("beyond margin", "within margin")
    wide = quality_table(scored_documents("x", delta=0.05), QualityOptions(margin=0.2))
    assert wide[0].verdict == "within margin"


def test_holm_counts_the_rules_and_not_the_reference(records: list[QualityRecord]) -> None:
    _, mild, harsh = quality_table(records)
    expected = multipletests([mild.p, harsh.p], method="holm")[1]
    assert [mild.p_corrected, harsh.p_corrected] == pytest.approx(expected.tolist())
    expected = multipletests([mild.non_inferiority_p, harsh.non_inferiority_p], method="holm")[1]
    got = [mild.non_inferiority_p_corrected, harsh.non_inferiority_p_corrected]
    assert got == pytest.approx(expected.tolist())


def test_twelve_books_are_twelve_units_however_many_chapters() -> None:
    row = quality_table(scored_documents("x", documents=60, clusters=12))[0]
    assert (row.documents, row.clusters, row.method) == (60, 12, "cluster t")
    assert "12 clusters" in row.note


def test_two_clusters_give_nan_unknown_and_a_sentence() -> None:
    row = quality_table(scored_documents("x", clusters=2))[0]
    unknown = (row.delta_nll_low, row.p, row.delta_nll_upper, row.minimum_detectable_delta_nll)
    assert all(math.isnan(value) for value in unknown)
    assert (row.verdict, row.non_inferior) == ("unknown", False)
    assert "need 3" in row.note


def test_an_equal_difference_everywhere_is_not_taken_for_certainty() -> None:
    row = quality_table(scored_documents("x", delta=0.05, spread=0))[0]
    assert math.isnan(row.delta_nll_low)
    assert "no spread" in row.note


def test_positions_and_domains_add_up_to_the_whole(records: list[QualityRecord]) -> None:
    row = quality_table(records)[2]
    for parts in (row.by_position, row.by_domain):
        assert sum(part.tokens for part in parts.values()) == row.tokens
        total = sum(part.delta_nll * part.tokens for part in parts.values())
        assert total / row.tokens == pytest.approx(row.delta_nll)
    assert set(row.by_domain) == {"prose", "code"}


def test_overlap_and_kept_experts_are_told_by_layer(records: list[QualityRecord]) -> None:
    row = quality_table(records)[1]
    assert row.top_k_overlap_by_layer == pytest.approx((0.5, 0.25))
    assert row.top_k_overlap == pytest.approx(0.375)
    assert row.experts_by_layer == pytest.approx((2.0, 2.0))


def test_the_order_of_documents_changes_nothing(records: list[QualityRecord]) -> None:
    mild = [r for r in records if r.config_name == "mild"]
    assert render_json(quality_table(mild[::-1])) == render_json(quality_table(mild))


def test_of_two_records_for_one_document_the_last_counts(records: list[QualityRecord]) -> None:
    mild = [r for r in records if r.config_name == "mild"]
    wrong = replace(mild[3], nll_sum=1e6)
    assert render_json(quality_table([wrong, *mild])) == render_json(quality_table(mild))


def test_histograms_of_different_width_add_up(records: list[QualityRecord]) -> None:
    mild = [r for r in records if r.config_name == "mild"]
    wider = replace(mild[0], count_histogram=[[*row, 0, 0] for row in mild[0].count_histogram])
    one, two = analyze_quality(mild), analyze_quality([wider, *mild[1:]])
    assert one["load_balance"] == two["load_balance"]


def test_a_rule_without_tokens_is_refused(records: list[QualityRecord]) -> None:
    with pytest.raises(InputError, match="no token was scored under mild"):
        quality_table([replace(r, tokens=0) for r in records if r.config_name == "mild"])


def test_the_block_is_strict_json_with_every_promised_column(
    records: list[QualityRecord],
) -> None:
    block = json.loads(json.dumps(analyze_quality(records), allow_nan=False))
    assert [rule["config_name"] for rule in block["rules"]] == ["topk_8", "mild", "harsh"]
    assert set(REQUIRED) <= set(block["rules"][1])
    assert set(block["rules"][1]) == set(quality_definitions())
    assert block["margin"] == pytest.approx(math.log(1.01))
    assert block["load_balance"]["mild"]["measures"]["cv"]["noise"] > 0


def test_rules_scored_on_other_tokens_are_pointed_out(records: list[QualityRecord]) -> None:
    assert analyze_quality(records)["notes"] == []
    assert "same tokens" in analyze_quality(records[:-1])["notes"][0]


def _write(path: Path, records: list[QualityRecord], *, wrapped: bool) -> None:
    lines = [{"header": {"window": 512}, "schema_version": 1}]
    for record in records:
        lines.append(
            {"schema_version": 1} | ({"record": asdict(record)} if wrapped else asdict(record))
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.parametrize("wrapped", [True, False])
def test_scored_documents_come_back_as_written(
    tmp_path: Path, records: list[QualityRecord], wrapped: bool
) -> None:
    _write(tmp_path / QUALITY_JOURNAL, records, wrapped=wrapped)
    assert read_quality(tmp_path / QUALITY_JOURNAL) == tuple(records)
    (tmp_path / RESULTS_CSV).write_text(render_header(), encoding="utf-8")
    assert load_results(tmp_path).quality == tuple(records)


def test_a_line_that_lacks_a_field_is_refused(tmp_path: Path, records: list[QualityRecord]) -> None:
    path = tmp_path / QUALITY_JOURNAL
    _write(path, records[:2], wrapped=False)
    path.write_text(path.read_text(encoding="utf-8").replace('"kl_max"', '"kl_least"', 1))
    with pytest.raises(ResultsError, match=r"line 2 isn't a record \(kl_max: Field required\)"):
        read_quality(path)
