"""The summary of a run: pairing, correction, refusals, and strict JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from bh_routing.analysis.comparisons import METRICS, analyze_results
from bh_routing.errors import InputError
from bh_routing.results.files import render_json

CONFIGS = {"topk_8": 8.0, "bh_strict": 4.0, "bh_moderate": 5.0, "bh_loose": 6.0}


def suite(seed: int = 0, prompts: int = 12) -> pd.DataFrame:
    """A run of four configurations, shuffled: pairing must go by prompt, never by order."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "config_name": name,
            "prompt_text": f"prompt {i}",
            "prompt_category": ("simple", "medium", "complex")[i % 3],
            "avg_experts_per_token": mean + (name != "topk_8") * rng.normal(0, 0.3),
            "inference_time_sec": 1 + 0.1 * i + rng.normal(0, 0.02),
            "tokens_per_sec": 50 + rng.normal(0, 2),
            "expert_utilization_cv": 0.3 + rng.normal(0, 0.02),
            "status": "ok",
        }
        for name, mean in CONFIGS.items()
        for i in range(prompts)
    ]
    table = pd.DataFrame(rows)
    rest = table.iloc[1:].sample(frac=1.0, random_state=seed)
    return pd.concat([table.iloc[:1], rest], ignore_index=True)


def _metric(table: pd.DataFrame, name: str, metric: str) -> np.ndarray:
    own = table[table["config_name"] == name].sort_values("prompt_text")
    return own[metric].to_numpy()


def test_every_test_equals_scipys_on_rows_matched_by_prompt() -> None:
    table = suite()
    summary = analyze_results(table)
    for name in ("bh_strict", "bh_moderate", "bh_loose"):
        for metric in METRICS:
            x, y = _metric(table, name, metric), _metric(table, "topk_8", metric)
            ours, scipys = summary["comparisons"][name][metric], stats.ttest_rel(x, y)
            assert ours["p"] == pytest.approx(scipys.pvalue, rel=1e-9)
            assert ours["wilcoxon_p"] == pytest.approx(stats.wilcoxon(x, y).pvalue, rel=1e-9)
            assert ours["low"] == pytest.approx(scipys.confidence_interval().low, rel=1e-9)


def test_p_is_corrected_by_holm_over_configurations_within_a_metric() -> None:
    comparisons = analyze_results(suite())["comparisons"]
    for metric in METRICS:
        raw = [block[metric]["p"] for block in comparisons.values()]
        corrected = [block[metric]["p_corrected"] for block in comparisons.values()]
        assert corrected == pytest.approx(multipletests(raw, method="holm")[1], rel=1e-12)


@pytest.mark.parametrize(("shift", "is_significant"), [(0.75, False), (2.0, True)])
def test_the_flag_follows_the_corrected_p_and_not_the_raw_one(
    shift: float, is_significant: bool
) -> None:
    table = suite().sort_values(["config_name", "prompt_text"])[["config_name", "prompt_text"]]
    shifts = table["config_name"].map({"bh_strict": shift}).fillna(0.0)
    signs = np.where(table["config_name"] == "topk_8", 0, np.tile([1, -1], len(table) // 2))
    ours = analyze_results(table.assign(tokens_per_sec=50 + shifts + signs))["comparisons"]
    strict = ours["bh_strict"]["tokens_per_sec"]
    assert strict["p"] < 0.05
    assert strict["significant"] == is_significant == (strict["p_corrected"] < 0.05)


def test_reduction_is_the_mean_of_ratios_and_not_the_ratio_of_means() -> None:
    table = suite()
    x, y = (_metric(table, name, "inference_time_sec") for name in ("bh_loose", "topk_8"))
    ours = analyze_results(table)["comparisons"]["bh_loose"]["inference_time_sec"]
    assert ours["reduction"] == pytest.approx((1 - x / y).mean(), rel=1e-9)
    assert ours["reduction_of_means"] == pytest.approx(1 - x.mean() / y.mean(), rel=1e-9)
    assert ours["reduction"] != pytest.approx(ours["reduction_of_means"], rel=1e-6)


def test_a_failed_row_leaves_its_pair_out_and_is_counted() -> None:
    table = suite()
    failed = (table["config_name"] == "bh_strict") & (table["prompt_text"] == "prompt 3")
    table.loc[failed, "status"] = "failed"
    table.loc[failed, list(METRICS)] = math.nan
    summary = analyze_results(table)
    ours = summary["comparisons"]["bh_strict"]["avg_experts_per_token"]
    others = summary["comparisons"]["bh_loose"]["avg_experts_per_token"]
    assert (ours["n"], ours["left_out"], others["n"]) == (11, 1, 12)
    assert summary["rows"] == {"total": 48, "ok": 47, "failed": 1}
    assert summary["configurations"]["bh_strict"]["failed"] == 1


def test_a_constant_difference_is_never_significant() -> None:
    table = suite()
    table.loc[table["config_name"] == "bh_strict", "avg_experts_per_token"] = 4.0
    ours = analyze_results(table)["comparisons"]["bh_strict"]["avg_experts_per_token"]
    assert ours["mean_difference"] == -4.0
    assert [ours[key] for key in ("t", "p", "p_corrected", "cohens_d", "low")] == [None] * 5
    assert ours["significant"] is False
    assert "no spread" in ours["note"]


def test_a_test_that_cannot_be_done_is_not_counted_by_holm() -> None:
    table = suite()
    table.loc[table["config_name"] == "bh_strict", "avg_experts_per_token"] = 4.0
    block = analyze_results(table)["comparisons"]
    raw = [block[name]["avg_experts_per_token"]["p"] for name in ("bh_moderate", "bh_loose")]
    smallest = min(raw)
    name = ("bh_moderate", "bh_loose")[raw.index(smallest)]
    corrected = block[name]["avg_experts_per_token"]["p_corrected"]
    assert corrected == pytest.approx(2 * smallest, rel=1e-9)


@pytest.mark.parametrize("prompts", [1, 2])
def test_too_few_prompts_give_null_and_a_sentence(prompts: int) -> None:
    ours = analyze_results(suite(prompts=prompts))["comparisons"]["bh_loose"]
    assert ours["tokens_per_sec"]["p"] is None
    assert "tests and intervals need 3" in ours["tokens_per_sec"]["note"]


def test_the_summary_of_a_run_with_nothing_but_failures_is_strict_json() -> None:
    table = suite()
    table["status"] = "failed"
    table[list(METRICS)] = math.nan

    def refuse(text: str) -> None:
        raise AssertionError(f"not JSON: {text}")

    summary = json.loads(render_json(analyze_results(table)), parse_constant=refuse)
    assert summary["rows"]["failed"] == 48


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["bh_x", "topk_4", "topk_8"], "topk_4"),
        (["bh_x", "topk_4", "top_k_2"], "topk_4"),
        (["bh_x", "top_k"], "top_k"),
        (["bh_x", "topknot"], None),
    ],
)
def test_results_that_name_no_baseline_have_the_first_top_k(
    names: list[str], expected: str
) -> None:
    table = pd.concat(
        [
            suite(prompts=3).query("config_name == 'topk_8'").assign(config_name=name)
            for name in names
        ]
    )
    summary = analyze_results(table)
    assert summary["baseline"] == expected
    assert len(summary["comparisons"]) == (len(names) - 1 if expected else 0)


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [("bh_strict", "bh_strict"), ("bh_loose", "bh_loose"), (None, None), ("topk_2", None)],
)
def test_the_baseline_is_the_one_that_the_run_recorded(
    recorded: str | None, expected: str | None
) -> None:
    table = suite(prompts=3)
    table.attrs["baseline"] = recorded
    summary = analyze_results(table)
    assert summary["baseline"] == expected
    assert analyze_results(table, baseline="topk_8")["baseline"] == "topk_8"


def test_an_unknown_baseline_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'topk_8'"):
        analyze_results(suite(), baseline="topk8")


def test_a_table_without_prompts_is_refused() -> None:
    with pytest.raises(InputError, match="lack prompt_text"):
        analyze_results(suite().drop(columns="prompt_text"))


def test_a_repeated_prompt_counts_once() -> None:
    table = suite()
    again = analyze_results(pd.concat([table, table]))
    assert again["comparisons"] == analyze_results(table)["comparisons"]
    assert "48" in again["notes"][0]


def test_the_users_table_is_left_as_it_was() -> None:
    table = suite().drop(columns="status")
    before = table.copy()
    analyze_results(table)
    pd.testing.assert_frame_equal(table, before)
