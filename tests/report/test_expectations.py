from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from bh_routing.analysis.comparisons import analyze_results
from bh_routing.analysis.results import Results
from bh_routing.report.facts import Facts
from bh_routing.report.judge import Line, compare_expectations, count_verdicts

MakeResults = Callable[..., pd.DataFrame]
MIDDLES = {
    "topk_8": 8.0,
    "bh_strict": 4.0,
    "bh_moderate": 5.0,
    "bh_loose": 6.0,
    "bh_adaptive": 4.5,
}
DEVICES = {
    "an RTX 3090": {"device": "cuda:0", "device_name": "NVIDIA GeForce RTX 3090"},
    "a T4": {"device": "cuda", "device_name": "Tesla T4"},
}


def lines_of(results: pd.DataFrame, run: dict[str, Any]) -> dict[str, Line]:
    folder = Results(folder=Path("nowhere"), experiments=results, run=run)
    facts = Facts(results=folder, summary=analyze_results(results))
    return {str(line.subject): line for line in compare_expectations(facts)}


def test_every_expectation_has_its_line(
    results: pd.DataFrame, run_document: dict[str, Any]
) -> None:
    lines = lines_of(results, run_document)
    assert [(line.subject, line.expected) for line in lines.values()] == [
        ("Experts, `topk_8`", "8.00"),
        ("Experts, `bh_strict`", "3.5 to 4.5"),
        ("Experts, `bh_moderate`", "4.5 to 5.5"),
        ("Experts, `bh_loose`", "5.5 to 6.5"),
        ("Experts, `bh_adaptive`", "4.0 to 5.0"),
        (
            "Difference in experts, raw p of the paired t test",
            "p < 0.001 in every BH configuration",
        ),
        ("Cohen's d of that difference, paired", "above 0.8 in size"),
        ("Generation time of BH against Top-K", "5 to 15 % longer"),
        ("Variation (CV) of expert load, Top-K", "0.25 to 0.35"),
        ("Variation (CV) of expert load, BH", "0.20 to 0.30"),
        ("Experts saved, mean of the BH configurations", "30 to 50 %"),
        ("Experts saved, `bh_strict`", "45 to 55 %"),
        ("Experts saved, `bh_moderate`", "30 to 45 %"),
        ("Experts saved, `bh_loose`", "20 to 30 %"),
        ("Experts saved, `bh_adaptive`", "35 to 50 %"),
        ("60 experiments on an RTX 3090", "15 to 20 minutes"),
        ("60 experiments on a T4", "25 to 35 minutes"),
        ("60 experiments on a CPU with 16 cores", "90 to 120 minutes"),
        ("Peak memory", "8 to 20 GB"),
    ]
    assert sum(count_verdicts(list(lines.values())).values()) == len(lines)


def test_a_run_in_the_middle_of_every_range_meets_them(
    make_results: MakeResults, run_document: dict[str, Any]
) -> None:
    results = make_results(MIDDLES)
    baseline = results["config_name"] == "topk_8"
    results["expert_utilization_cv"] = 0.25
    results.loc[baseline, "expert_utilization_cv"] = 0.30
    base = results.loc[baseline, "inference_time_sec"].to_numpy()
    for name in MIDDLES:
        mine = results["config_name"] == name
        results.loc[mine, "inference_time_sec"] = base * (1.0 if name == "topk_8" else 1.1)
    lines = lines_of(results, run_document)
    judged = {name: line for name, line in lines.items() if "60 exp" not in name}
    del judged["Peak memory"]
    assert {name: line.verdict for name, line in judged.items()} == dict.fromkeys(judged, "met")


@pytest.mark.parametrize(("mean", "verdict"), [(3.49, "not met"), (4.51, "not met"), (4.0, "met")])
def test_a_mean_outside_its_range_does_not_meet_it(
    make_results: MakeResults, run_document: dict[str, Any], mean: float, verdict: str
) -> None:
    results = make_results(MIDDLES)
    results.loc[results["config_name"] == "bh_strict", "avg_experts_per_token"] = mean
    line = lines_of(results, run_document)["Experts, `bh_strict`"]
    assert (line.verdict, line.measured) == (verdict, f"{mean:.2f}")
    assert bool(line.why) == (verdict == "not met")


def test_the_verdict_on_p_is_on_the_raw_t_test_and_names_wilcoxons_floor(
    make_results: MakeResults, run_document: dict[str, Any]
) -> None:
    line = lines_of(make_results(MIDDLES), run_document)[
        "Difference in experts, raw p of the paired t test"
    ]
    assert line.verdict == "met"
    assert "12 pairs can't go below 0.0005" in line.why
    few = lines_of(make_results(MIDDLES, 3), run_document)[
        "Difference in experts, raw p of the paired t test"
    ]
    assert "3 pairs can't go below 0.250" in few.why


def test_without_a_test_p_and_d_are_not_comparable(
    make_results: MakeResults, run_document: dict[str, Any]
) -> None:
    lines = lines_of(make_results(MIDDLES, 2), run_document)
    for subject in ("Difference in experts, raw p of the paired t test",
                    "Cohen's d of that difference, paired"):  # fmt: skip
        assert lines[subject].verdict == "not comparable"
        assert "2 complete pairs" in lines[subject].why


def test_a_changed_configuration_is_not_comparable(
    results: pd.DataFrame, run_document: dict[str, Any]
) -> None:
    run_document["spec"]["configs"]["bh_strict"]["alpha"] = 0.03
    line = lines_of(results, run_document)["Experts, `bh_strict`"]
    assert (line.verdict, line.why) == (
        "not comparable",
        "`bh_strict` has alpha 0.03 here, not 0.01",
    )


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"method": "top_p", "p": 0.8}, "`bh_strict` has method top_p here, not bh"),
        (
            {"method": "bh", "alpha": 0.01, "null": "gaussian"},
            "`bh_strict` has null gaussian here, not background",
        ),
    ],
)
def test_another_rule_under_a_standard_name_is_not_comparable(
    results: pd.DataFrame, run_document: dict[str, Any], config: dict[str, Any], why: str
) -> None:
    run_document["spec"]["configs"]["bh_strict"] = config
    line = lines_of(results, run_document)["Experts, `bh_strict`"]
    assert (line.verdict, line.why) == ("not comparable", why)


def test_a_missing_configuration_is_not_comparable(
    make_results: MakeResults, run_document: dict[str, Any]
) -> None:
    lines = lines_of(make_results({"topk_8": 8.0, "my_own": 4.0}), run_document)
    assert lines["Experts, `bh_loose`"].verdict == "not comparable"
    assert lines["Experts saved, mean of the BH configurations"].verdict == "not comparable"


def test_another_baseline_or_shape_of_model_is_not_comparable(
    make_results: MakeResults, run_document: dict[str, Any]
) -> None:
    configs = {"topk_4": 4.0, **{k: v for k, v in MIDDLES.items() if k != "topk_8"}}
    lines = lines_of(make_results(configs), run_document)
    assert lines["Experts saved, `bh_loose`"].why == "the baseline is `topk_4`, not `topk_8`"
    run_document["model"]["num_experts"] = 128
    line = lines_of(make_results(MIDDLES), run_document)["Experts, `topk_8`"]
    assert line.why == "the model has 128 experts, top-8, not 64, top-8"


def test_load_that_noise_alone_explains_says_so(
    results: pd.DataFrame, run_document: dict[str, Any]
) -> None:
    line = lines_of(results, run_document)["Variation (CV) of expert load, BH"]
    assert line.verdict == "not met"
    assert "by sampling noise alone" in line.why


@pytest.mark.parametrize("hardware", list(DEVICES))
def test_duration_is_judged_on_the_hardware_and_model_it_was_expected_of(
    results: pd.DataFrame, run_document: dict[str, Any], hardware: str
) -> None:
    run_document["model"] |= DEVICES[hardware] | {"name": "allenai/OLMoE-1B-7B-0924"}
    run_document["timing"]["experiments_sec"] = 60 * 18.0
    run_document["peak_memory_bytes"] = 14_000_000_000
    lines = lines_of(results, run_document)
    judged = {s: line.verdict for s, line in lines.items() if s.startswith("60 experiments")}
    expected = dict.fromkeys(judged, "not comparable")
    met = "met" if hardware == "an RTX 3090" else "not met"
    assert judged == expected | {f"60 experiments on {hardware}": met}
    assert lines["Peak memory"].verdict == "met"
    assert lines[f"60 experiments on {hardware}"].measured == "18.0 minutes"


def test_a_small_model_says_nothing_of_duration_and_memory(
    results: pd.DataFrame, run_document: dict[str, Any]
) -> None:
    run_document["provenance"]["cpu_count"] = 16
    lines = lines_of(results, run_document)
    assert lines["60 experiments on a CPU with 16 cores"].why == "expected of OLMoE-1B-7B"
    assert lines["60 experiments on a T4"].why == "this run: a CPU with 16 cores"
    assert lines["Peak memory"].verdict == "not comparable"


def test_another_number_of_experiments_says_nothing_of_duration(
    make_results: MakeResults, run_document: dict[str, Any]
) -> None:
    run_document["provenance"]["cpu_count"] = 16
    run_document["model"]["name"] = "allenai/OLMoE-1B-7B-0924"
    lines = lines_of(make_results(MIDDLES, 3), run_document)
    assert lines["60 experiments on a CPU with 16 cores"].why == "this run has 15 experiments"
