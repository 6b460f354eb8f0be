"""Sentences say no more than their numbers decide."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bh_routing.analysis.comparisons import analyze_results
from bh_routing.analysis.quality import QualityOptions, analyze_quality
from bh_routing.analysis.results import Results
from bh_routing.report import findings, generate_markdown_report
from bh_routing.report.facts import Facts
from bh_routing.report.markdown import context, render
from bh_routing.report.quality import quality_findings
from bh_routing.report.text import loss_percent
from tests.analysis.scored import scored_documents
from tests.analysis.swept import with_experts

MakeResults = Callable[..., pd.DataFrame]


def facts(results: pd.DataFrame, run: Mapping[str, Any] | None = None, **summary: Any) -> Facts:
    folder = Results(folder=Path("nowhere"), experiments=results, run=run or {})
    return Facts(results=folder, summary=analyze_results(results) | summary)


def section(found: Facts, title: str) -> list[str]:
    """The items of a section of the report."""
    report = render("REPORT.md.j2", **context(found))
    body = report.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [line.removeprefix("- ") for line in body.splitlines() if line.startswith("- ")]


def summarise(found: Facts) -> list[str]:
    return section(found, "Summary")


def conclude(found: Facts) -> list[str]:
    return section(found, "Conclusions")


def verdict(found: Facts) -> list[str]:
    return render("verdict.md.j2", **context(found)).strip().split("\n\n")


def timed(make: MakeResults, seconds: Mapping[str, float], **means: float) -> pd.DataFrame:
    """Results with these mean experts, and times that vary by 1 % around these."""
    results = make({"topk_8": 8.0} | means, 12)
    noise = np.random.default_rng(0).normal(1.0, 0.01, len(results))
    results["inference_time_sec"] = results["config_name"].map(seconds) * noise
    results["decode_time_sec"] = results["inference_time_sec"]
    return results


def test_only_fewer_experts_can_fail_to_buy_speed(make_results: MakeResults) -> None:
    wide = timed(make_results, {"topk_8": 1.0, "wide": 1.3}, wide=8.0)
    is_wide = wide["config_name"] == "wide"
    wide.loc[is_wide, "avg_experts_per_token"] += 1.5
    (sentence,) = (s for s in conclude(facts(wide)) if "longer" in s)
    assert sentence == "`wide` took longer."
    assert "Fewer experts" not in findings.latency(facts(wide))
    assert "more experts than `topk_8` in `wide`" in " ".join(conclude(facts(wide)))
    slow = timed(make_results, {"topk_8": 1.0, "bh": 1.3}, bh=4.0)
    (sentence,) = (s for s in conclude(facts(slow)) if "longer" in s)
    assert sentence.startswith("Fewer experts brought no speed-up here: `bh` took longer")


def test_a_slow_wide_rule_does_not_hide_that_a_narrow_one_is_faster(
    make_results: MakeResults,
) -> None:
    results = timed(make_results, {"topk_8": 1.0, "wide": 1.3, "bh": 0.8}, wide=8.0, bh=4.0)
    results.loc[results["config_name"] == "wide", "avg_experts_per_token"] += 1.5
    (sentence,) = (s for s in conclude(facts(results)) if "longer" in s)
    assert sentence == "`bh` took less time than `topk_8`; `wide` took longer."
    title = findings.latency(facts(results))
    assert title == "Fewer experts took less time in every configuration that keeps fewer"


def test_experts_that_differ_by_the_same_on_every_prompt_are_a_finding(
    make_results: MakeResults,
) -> None:
    results = make_results({"topk_8": 8.0, "topk_4": 4.0, "same": 8.0}, 12)
    results.loc[results["config_name"] == "same", "avg_experts_per_token"] = 8.0
    sides = findings.expert_sides(facts(results))
    assert sides == {"topk_4": "below", "same": "same"}
    text = " ".join(conclude(facts(results)))
    assert "fewer experts than `topk_8` in `topk_4`; as many experts as `topk_8` in `same`" in text
    assert "decide nothing" not in text


def test_a_mean_below_the_baseline_is_not_yet_fewer(make_results: MakeResults) -> None:
    results = make_results({"topk_8": 8.0, "bh": 4.0}, 12)
    is_bh = results["config_name"] == "bh"
    results.loc[is_bh, "avg_experts_per_token"] = [7.5, 8.4] * 6
    assert findings.expert_sides(facts(results)) == {"bh": "undecided"}
    assert "no significant difference for `bh`" in " ".join(conclude(facts(results)))
    assert findings.latency(facts(results)).startswith("Experts kept and time")


def scored(losses: Mapping[str, tuple[float, float]], spread: float, **tokens: int) -> Any:
    """The quality block of documents whose loss varies by `spread` around these."""
    rng = np.random.default_rng(3)
    records = []
    for name, (experts, loss) in losses.items():
        rule = {"method": "top_k" if name in STATIC else "bh"}
        own = scored_documents(name, delta=loss, documents=24, rule=rule)[: tokens.get(name, 24)]
        noise = rng.normal(0, spread, len(own)) if experts % 1 else np.zeros(len(own))
        own = [
            r.__class__(**{**_fields(r), "nll_sum": r.nll_sum + n * r.tokens})
            for r, n in zip(own, noise, strict=True)
        ]
        records += with_experts(own, experts)
    return analyze_quality(records, QualityOptions(resamples=500))


def _fields(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


STATIC = {"topk_8": (8.0, 0.0), "topk_5": (5.0, 0.109), "topk_4": (4.0, 0.245)}


@pytest.mark.parametrize(
    ("loss", "spread", "answer", "words"),
    [
        (0.1769, 0.05, "undecided", "`bh` doesn't differ clearly from static top-k"),
        (0.1771, 0.05, "undecided", "`bh` doesn't differ clearly from static top-k"),
        (0.30, 0.05, "no", "`bh` has a clearly higher perplexity than static top-k"),
        (0.10, 0.05, "yes", "`bh` has a clearly lower perplexity than static top-k"),
        (0.10, 0.60, "undecided", "`bh` doesn't differ clearly from static top-k"),
    ],
)
def test_static_top_k_is_beaten_by_an_interval_and_not_by_a_sign(
    results: pd.DataFrame, loss: float, spread: float, answer: str, words: str
) -> None:
    quality = scored(STATIC | {"bh": (4.5, loss)}, spread)
    assert quality_findings({"quality": quality}).answers["bh"] == answer
    assert words in " ".join(summarise(facts(results, quality=quality)))
    assert words in " ".join(conclude(facts(results, quality=quality)))
    assert words in " ".join(verdict(facts(results, quality=quality)))


@pytest.mark.parametrize(("loss", "answer"), [(0.18, "undecided"), (0.25, "no"), (0.1, "yes")])
def test_a_summary_without_that_test_is_judged_by_its_intervals(loss: float, answer: str) -> None:
    def row(name: str, mean: float, delta: float) -> dict[str, Any]:
        ends = {"delta_nll_low": delta - 0.01, "delta_nll_high": delta + 0.01}
        found = {"config_name": name, "mean_experts": mean, "delta_nll": delta, "tokens": 9}
        return {**found, **ends, "documents": 3, "rule": "top_k" if name in STATIC else "bh"}

    rows = [row(name, *numbers) for name, numbers in STATIC.items()] + [row("bh", 4.5, loss)]
    assert quality_findings({"quality": {"rules": rows}}).answers == {"bh": answer}
    rows[-1]["tokens"] = 8
    assert quality_findings({"quality": {"rules": rows}}).answers == {"bh": "unknown"}


def test_what_was_scored_on_less_text_is_named_and_not_compared(
    results: pd.DataFrame, tmp_path: Path
) -> None:
    quality = scored(STATIC | {"bh": (4.5, 0.18), "other": (4.6, 0.2)}, 0.05, bh=3)
    found = facts(results, quality=quality)
    whole, part = found.quality.tokens, found.quality.by_name["bh"].tokens
    words = f"not compared: `bh` ({part:,.0f} of {whole:,.0f} tokens)"
    for sentences in (summarise(found), conclude(found), verdict(found)):
        text = " ".join(sentences)
        assert words in text
        assert "`bh` changes" not in text and "`bh` has the lowest" not in text
    report = generate_markdown_report(results, dict(found.summary), tmp_path).read_text()
    assert "Every configuration was scored on the same" not in report
    assert "`topk_8`, `topk_5`, `topk_4` and `other` were scored on the same" in report
    assert "weren't scored on the same tokens" in report


def test_the_lowest_estimate_is_not_called_best_while_others_reach_it(
    results: pd.DataFrame,
) -> None:
    near = scored(STATIC | {"a": (4.5, 0.20), "b": (4.6, 0.201), "c": (4.4, 0.9)}, 0.05)
    assert any(
        "; `" in s and "isn't clearly apart" in s for s in conclude(facts(results, quality=near))
    )
    far = scored(STATIC | {"a": (4.5, 0.20), "b": (4.6, 0.9)}, 0.05)
    text = " ".join(conclude(facts(results, quality=far)))
    assert "`a` has the lowest estimate" in text
    assert "clearly apart" not in text


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"executor": {"name": "local"}}, "prompts on one machine, whose speed was steady"),
        ({"executor": {"name": "ray", "workers": 4}}, "prompts on 4 workers of a Ray cluster;"),
        (
            {"sessions": [{"platform": "a", "cpu_count": 2}, {"platform": "b", "cpu_count": 8}]},
            "prompts on 2 machines, since the run was resumed on another;",
        ),
        (
            {"sessions": [{"platform": "a", "cpu_count": 2}] * 2},
            "prompts on one machine, whose speed was steady;",
        ),
        ({}, "12 prompts; they"),
    ],
)
def test_the_report_says_where_it_ran_only_as_far_as_the_run_does(
    results: pd.DataFrame, run: dict[str, Any], words: str
) -> None:
    results["decode_time_sec"] = 0.5
    assert words in verdict(facts(results, run))[-1]


def test_speed_that_can_not_be_judged_is_not_called_steady(make_results: MakeResults) -> None:
    results = make_results({"topk_8": 8.0, "bh": 4.0}, 2)
    assert findings.steadiness(facts(results)) == "unknown"
    assert "steady" not in verdict(facts(results, {"executor": {"name": "local"}}))[-1]


def test_load_is_compared_in_units_of_noise_and_by_interval(make_results: MakeResults) -> None:
    results = make_results({"topk_8": 8.0, "a": 4.0, "b": 4.0, "c": 4.0}, 12)
    ratio = results["config_name"].map({"topk_8": 2.0, "a": 2.1, "b": 2.1, "c": 2.0})
    wide = np.tile([-0.9, 0.9], 6)
    shift = np.concatenate([np.zeros(12), np.linspace(-0.01, 0.01, 12), wide, np.zeros(12)])
    results["expert_utilization_cv"] = (ratio + shift) * results["expert_utilization_cv_noise"]
    assert findings.balance_sides(facts(results)) == {
        "a": "above", "b": "undecided", "c": "same",
    }  # fmt: skip
    text = " ".join(conclude(facts(results)))
    assert "less even in `a`, as even in `c` and not clearly different in `b`" in text


def test_a_time_without_an_interval_is_shown_without_one(make_results: MakeResults) -> None:
    results = make_results({"topk_8": 8.0, "bh": 4.0}, 1)
    (sentence,) = (s for s in summarise(facts(results)) if s.startswith("**Time.**"))
    assert "(`bh`, no interval)" in sentence
    assert "`bh` has too few times for an interval" in " ".join(conclude(facts(results))).lower()


def test_wilcoxons_floor_is_named_only_where_the_test_is_exact(
    make_results: MakeResults, tmp_path: Path
) -> None:
    for prompts, is_exact in ((12, True), (50, True), (51, False)):
        results = make_results({"topk_8": 8.0, "bh": 4.0}, prompts)
        report = generate_markdown_report(results, analyze_results(results), tmp_path)
        assert ("can't give less than" in report.read_text()) == is_exact


def recommended(results: pd.DataFrame, quality: Any, commands: Mapping[str, str]) -> str:
    """The last section of a report."""
    run: dict[str, Any] = {"alternatives": {"rules": [], "skipped": None, "commands": commands}}
    found = facts(results, run, quality=quality)
    return render("REPORT.md.j2", **context(found)).partition("## Recommendation\n\n")[2]


def test_the_rule_of_lowest_loss_that_beats_static_top_k_is_recommended(
    results: pd.DataFrame,
) -> None:
    better = {"low": (4.4, 0.12), "mid": (4.6, 0.08), "worse": (4.7, 0.3)}
    quality = scored(STATIC | better, 0.01)
    text = recommended(results, quality, {"mid": "bh-routing run --rule a\n## b"})
    row = quality_findings({"quality": quality}).by_name["mid"]
    low, high = loss_percent(row.perplexity_ratio_low), loss_percent(row.perplexity_ratio_high)
    assert text.startswith("**Use `mid`.** Of the rules with a clearly lower perplexity than")
    assert f"(95 % interval {low} to {high})" in text and "That is beyond the margin" in text
    assert text.endswith("\n\n    bh-routing run --rule a ## b\n")


@pytest.mark.parametrize(
    ("commands", "is_explained"), [({"mid": None}, True), ({"low": "x"}, False), ({}, False)]
)
def test_a_rule_that_no_option_states_has_a_sentence_in_place_of_its_command(
    results: pd.DataFrame, commands: dict[str, Any], is_explained: bool
) -> None:
    quality = scored(STATIC | {"mid": (4.6, 0.08)}, 0.01)
    text = recommended(results, quality, commands)
    assert ("No command is shown" in text and "`--config`" in text) == is_explained
    assert "    " not in text


@pytest.mark.parametrize("loss", [0.177, 0.3])
def test_static_top_k_is_recommended_where_nothing_pays(results: pd.DataFrame, loss: float) -> None:
    quality = scored(STATIC | {"bh": (4.5, loss)}, 0.05)
    text = recommended(results, quality, {"topk_5": "bh-routing run --rule top_k:k=5"})
    assert text.startswith(
        "**Use static top-k.** No rule has a clearly lower perplexity than static top-k"
    )
    assert "`topk_5` changes perplexity by" in text
    assert text.endswith("    bh-routing run --rule top_k:k=5\n")


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ({"topk_8": (8.0, 0.0), "bh": (4.5, 0.1)}, "none was compared with static top-k"),
        ({"topk_8": (8.0, 0.0)}, "quality was not measured"),
    ],
)
def test_without_a_comparison_nothing_is_recommended(
    results: pd.DataFrame, losses: dict[str, tuple[float, float]], why: str
) -> None:
    text = recommended(results, scored(losses, 0.05), {"bh": "bh-routing run"})
    assert text.startswith("No rule is recommended, since") and why in text
    assert "bh-routing run" not in text


BATCH_RUN: Mapping[str, Any] = {
    "model": {"name": "some/model", "model_top_k": 8},
    "spec": {"texts": ["my text.jsonl"]},
}
POINT = "config_name,budget,rank,mean_distinct_experts,perplexity_ratio\n"
COMPARED = "config_name,reference,domain,answer,saved,saved_low,saved_high\n"


def for_batches(results: pd.DataFrame, folder: Path, **model: object) -> str:
    """What a report says after the recommendation of one rule."""
    run = {**BATCH_RUN, "model": BATCH_RUN["model"] | model}
    read = Results(folder=folder, experiments=results, run=run)
    found = Facts(results=read, summary=analyze_results(results))
    text = render("REPORT.md.j2", **context(found)).partition("## Recommendation\n\n")[2]
    return text.partition("**For batches")[2]


def test_a_report_names_the_command_that_finds_a_rule_for_batches(
    results: pd.DataFrame, tmp_path: Path
) -> None:
    text = for_batches(results, tmp_path)
    assert "`bh_drop` with `scope: step_population`" in text
    assert text.endswith(
        "    bh-routing sweep --model some/model --text 'my text.jsonl' --cost distinct "
        f"--decode-batch 16 --output {tmp_path / 'steps'}\n"
    )
    broken = for_batches(results, tmp_path / "a\n# b")
    assert broken.endswith(f"--output '{tmp_path}/a # b/steps'\n")
    assert for_batches(results, tmp_path, model_top_k=1) == ""
    assert for_batches(results, tmp_path, name=None) == ""


def test_a_report_states_the_result_of_its_folders_sweep_by_step(
    results: pd.DataFrame, tmp_path: Path
) -> None:
    steps = tmp_path / "steps"
    steps.mkdir()
    points = "low@0.65,0.65,1,36.6,1.08\nhigh@0.75,0.75,1,42.3,1.03\nnext@0.75,0.75,2,42.2,1.04\n"
    compared = (
        "high@0.75,top_k,all,yes,0.85,0.84,0.86\nhigh@0.75,oea,all,yes,0.1,0.1,0.1\n"
        "low@0.65,top_k,all,undecided,0.5,-0.1,0.9\nhigh@0.75,top_k,prose,yes,0.2,0.1,0.3\n"
    )
    (steps / "points.csv").write_text(POINT + points)
    (steps / "comparisons.csv").write_text(COMPARED + compared)
    for text, is_by_step in (({"decode_batch": 8}, True), ({"decode_batch": None}, False)):
        (steps / "run.json").write_text(json.dumps({"text": text}))
        said = for_batches(results, tmp_path)
        assert ("In steps of 8 sequences" in said) is is_by_step
        assert ("`high@0.75`, which reads 42.3 distinct experts" in said) is is_by_step
        assert ("saves 85 % of static top-k's increase" in said) is is_by_step
        assert "low@0.65" not in said and "next@0.75" not in said
        assert "bh-routing sweep --model some/model" in said
