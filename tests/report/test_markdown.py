from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from jinja2 import UndefinedError
from scipy import stats

from bh_routing.analysis.comparisons import analyze_results
from bh_routing.errors import InputError
from bh_routing.report import create_visualizations, generate_markdown_report
from bh_routing.report import markdown as markdown_report
from bh_routing.report.charts import STANDARD
from bh_routing.report.conclusion import conclude_run
from bh_routing.report.text import MISSING, markdown, signed_percent
from bh_routing.results.files import find_json_object
from bh_routing.results.records import SUMMARY_JSON, TIMING_COLUMNS, TIMINGS

NO_QUALITY = "**Quality was not measured in this run.**"
MakeResults = Callable[..., pd.DataFrame]
FillFolder = Callable[..., Path]


def write(results: pd.DataFrame, folder: Path, **more: Any) -> str:
    path = generate_markdown_report(results, analyze_results(results) | more, folder)
    assert path == folder / "REPORT.md"
    return path.read_text(encoding="utf-8")


def part(report: str, title: str) -> str:
    """The section of this title."""
    return report.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(report: str, title: str, name: str) -> list[str]:
    """The cells of a configuration's first row in a section, without its name."""
    line = next(
        line for line in part(report, title).splitlines() if line.startswith(f"| `{name}` |")
    )
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_the_tables_hold_the_numbers_of_the_results(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    report = write(results, fill_folder(results))
    means = results.groupby("config_name").mean(numeric_only=True)
    wide = results.pivot(index="prompt_text", columns="config_name")
    for name in means.index:
        kept = cells(report, "Experts kept", name)
        assert kept[0] == f"{means.loc[name, 'avg_experts_per_token']:.2f}"
        assert cells(report, "Time", name)[0] == f"{means.loc[name, 'inference_time_sec']:.3f}"
        assert cells(report, "Load balance", name)[:2] == [
            f"{means.loc[name, 'expert_utilization_cv']:.2f}",
            f"{means.loc[name, 'expert_utilization_cv_noise']:.2f}",
        ]
        if name != "topk_8":
            experts = wide["avg_experts_per_token"]
            saved = (1 - experts[name] / experts["topk_8"]).mean()
            assert kept[4] == f"{100 * saved:.1f} %"
            seconds = wide["inference_time_sec"]
            slower = (seconds[name] / seconds["topk_8"] - 1).mean()
            assert cells(report, "Time", name)[1] == f"{100 * slower:+.1f} %"


def test_the_summary_gives_times_with_their_intervals(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    summary = part(write(results, fill_folder(results)), "Summary")
    seconds = results.pivot(index="prompt_text", columns="config_name")["inference_time_sec"]
    changes = seconds.drop(columns="topk_8").div(seconds["topk_8"], axis=0) - 1
    for name in (changes.mean().idxmin(), changes.mean().idxmax()):
        mean, error = changes[name].mean(), stats.sem(changes[name])
        low, high = stats.t.interval(0.95, len(changes) - 1, mean, error)
        ends = f"{signed_percent(low)} to {signed_percent(high)}"
        assert f"{signed_percent(mean)} (`{name}`, 95 % interval {ends})" in summary


def test_tests_of_one_pass_point_to_the_rounds_where_there_are_some(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    folder = fill_folder(results)
    assert "come from one pass" not in part(write(results, folder), "Statistical tests")
    names = results["config_name"].unique()
    rounds = [(name, n, name, "text", 5, 1, 1.0, 0.1) for n in (1, 2) for name in names]
    pd.DataFrame(rounds, columns=list(TIMING_COLUMNS)).to_csv(folder / TIMINGS, index=False)
    assert "trust the rounds" in part(write(results, folder), "Statistical tests")


def test_the_tests_are_those_of_scipy(results: pd.DataFrame, fill_folder: FillFolder) -> None:
    report = write(results, fill_folder(results))
    seconds = results.pivot(index="prompt_text", columns="config_name", values="inference_time_sec")
    tables = part(report, "Statistical tests").split("| Generation time per prompt, seconds |")[1]
    line = next(line for line in tables.splitlines() if line.startswith("| `bh_loose` |"))
    shown = [cell.strip() for cell in line.strip("|").split("|")]
    difference = seconds["bh_loose"] - seconds["topk_8"]
    t = stats.ttest_rel(seconds["bh_loose"], seconds["topk_8"])
    low, high = t.confidence_interval(0.95)
    assert shown[1] == "12"
    assert shown[2] == f"{difference.mean():+.3f}"
    assert shown[3] == f"[{low:.3f}, {high:.3f}]"
    assert float(shown[4].replace("−", "-")) == pytest.approx(t.pvalue, rel=0.5)
    assert shown[6] == f"{difference.mean() / difference.std(ddof=1):.1f}"
    assert "12 pairs can't give less than 0.0005" in part(report, "Statistical tests")


def test_categories_are_means_over_their_prompts(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    report = write(results, fill_folder(results))
    means = results.groupby(["config_name", "prompt_category"])["avg_experts_per_token"].mean()
    shown = cells(report, "By category", "bh_strict")
    for cell, category in zip(
        shown, ["simple", "medium", "complex", "domain-specific"], strict=True
    ):
        assert cell == f"{means['bh_strict', category]:.2f}"


def test_without_quality_the_report_says_so_first(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    report = write(results, fill_folder(results))
    assert part(report, "Summary").strip().startswith(f"- {NO_QUALITY}")
    assert "quality_vs_experts" not in report
    assert "Nothing here shows that experts can be left out" in part(report, "Conclusions")


def test_with_quality_the_report_leads_with_it(
    results: pd.DataFrame, quality: dict[str, Any], fill_folder: FillFolder
) -> None:
    report = write(results, fill_folder(results), quality=quality)
    rows = {row["config_name"]: row for row in quality["rules"]}
    change = f"{100 * (rows['bh_moderate']['perplexity_ratio'] - 1):+.1f} %"
    summary = part(report, "Summary").strip()
    assert summary.startswith("- **Quality against experts used.**")
    assert f"{100 * (rows['bh_strict']['perplexity_ratio'] - 1):+.1f} %" in summary
    assert report.index("## Quality against") < report.index("## Experts kept")
    assert cells(report, "Quality against experts used", "bh_moderate")[:2] == ["4.85", change]
    assert cells(report, "Quality against experts used", "topk_8")[1] == "0 %"
    assert "not measured" not in report


def test_the_overview_tells_experts_on_prompts_from_experts_on_text(
    results: pd.DataFrame, quality: dict[str, Any], fill_folder: FillFolder
) -> None:
    report = write(results, fill_folder(results), quality=quality)
    mean = results.loc[results["config_name"] == "bh_strict", "avg_experts_per_token"].mean()
    row = {r["config_name"]: r for r in quality["rules"]}["bh_strict"]
    shown = cells(report, "Summary", "bh_strict")
    assert shown[0] == f"{mean:.2f}"
    assert shown[2:4] == ["3.40", f"{100 * (row['perplexity_ratio'] - 1):+.1f} %"]


def test_losing_to_static_top_k_is_said_in_the_summary(
    results: pd.DataFrame, quality: dict[str, Any], fill_folder: FillFolder
) -> None:
    summary = part(write(results, fill_folder(results), quality=quality), "Summary")
    assert (
        "`bh_moderate` and `bh_adaptive` have a clearly higher perplexity than static top-k"
        in summary
    )
    conclusions = part((write(results, fill_folder(results), quality=quality)), "Conclusions")
    assert "Beyond the margin of +1.0 % perplexity, so not free" in conclusions


def test_the_scored_documents_in_the_folder_are_used_if_the_summary_lacks_them(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    folder = fill_folder(results)
    (folder / "quality.jsonl").write_text("", encoding="utf-8")
    assert NO_QUALITY in write(results, folder)


def test_the_plots_of_the_run_are_embedded(
    results: pd.DataFrame, quality: dict[str, Any], fill_folder: FillFolder
) -> None:
    folder = fill_folder(results)
    paths = create_visualizations(results, folder, {"quality": quality})
    report = write(results, folder, quality=quality)
    embedded = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", report)
    assert set(embedded) <= {str(path.relative_to(folder)) for path in paths}
    assert {Path(name).stem for name in embedded} == {"quality_vs_experts", *STANDARD}


def test_the_null_is_described_with_its_noise(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    report = write(results, fill_folder(results))
    null = part(report, "What alpha means here")
    assert "a tuning parameter, not an error rate: noise is rejected too" in null
    assert "| `bh_strict` | 0.01 | 4.10 | 97.0 % | [96.7, 97.3] | 10,000 |" in null
    assert "| `bh_moderate` | 0.05 | 5.47 | 99.1 % | [98.9, 99.3] | 10,000 |" in null
    said = "on pure noise, `bh_moderate`, at alpha 0.05, still keeps 5.47 experts"
    assert said in part(report, "Summary")


def test_noise_of_a_folder_that_names_no_configuration_stays_readable(
    results: pd.DataFrame, fill_folder: FillFolder, run_document: dict[str, Any]
) -> None:
    for entry in run_document["nulls"][0]["noise"]:
        del entry["config_name"]
    report = write(results, fill_folder(results, run_document))
    null = part(report, "What alpha means here")
    assert f"| {MISSING} | 0.05 | 5.47 | 99.1 % | [98.9, 99.3] | 10,000 |" in null
    assert "on pure noise, at alpha 0.05, it still keeps 5.47 experts" in part(report, "Summary")


def test_provenance_comes_from_run_json(results: pd.DataFrame, fill_folder: FillFolder) -> None:
    shown = part(write(results, fill_folder(results)), "Settings and provenance")
    assert "| Model | `demo`, 6 layers of 64 experts, top-8, 10.9 million parameters |" in shown
    assert "| Machine | 2 cores, 2 threads |" in shown
    assert "alpha 0.01, null background, max_k 8" in shown


def test_without_run_json_the_report_says_what_is_unknown(
    results: pd.DataFrame, tmp_path: Path
) -> None:
    report = write(results, tmp_path)
    assert "no readable run.json" in report
    assert "## What alpha means here" not in report


HOSTILE = "<script>alert(1)</script> | `x` \n# h\n- l \u202e$m$ [a](b) \x00 ![i](j) " + "z" * 10_000


def test_hostile_text_stays_text(
    results: pd.DataFrame, fill_folder: FillFolder, run_document: dict[str, Any]
) -> None:
    for column in ("prompt_text", "prompt_category", "generated_text"):
        results[column] = HOSTILE + results[column]
    results["config_name"] = results["config_name"].replace("bh_loose", "bh|`<b>\n# x")
    run = run_document
    run["model"]["name"] = run["provenance"]["platform"] = HOSTILE
    report = write(results, fill_folder(results, run))
    clean = write(results.assign(prompt_category="c", generated_text="g"), fill_folder(results))
    assert not re.search(r"<[a-zA-Z/!?]", report)
    assert "\x00" not in report and "\u202e" not in report
    assert "z" * 250 not in report and "…" in report
    headings = [line for line in report.splitlines() if line.startswith("#")]
    assert headings[1:] == [line for line in clean.splitlines() if line.startswith("#")][1:]
    for block in re.split(r"\n\n", report):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
            assert len(columns) == 1, lines[:3]


@pytest.mark.parametrize("configs", [["topk_8"], ["bh_only"], ["topk_8", "bh_strict"]])
@pytest.mark.parametrize("num_prompts", [1, 2])
def test_the_smallest_runs_get_a_report(
    make_results: MakeResults, tmp_path: Path, configs: list[str], num_prompts: int
) -> None:
    report = write(make_results(configs, num_prompts), tmp_path)
    assert not re.search(r"\b(nan|inf|None)\b", report, re.IGNORECASE)
    assert "\n\n\n" not in report
    assert not re.search(r"[.)] -$|^- *$| [.,;]", report, re.MULTILINE)
    sections = re.findall(r"^## .*\n\n(.*)", report, re.MULTILINE)
    assert all(body and not body.startswith("#") for body in sections)


def test_too_few_prompts_give_a_sentence_and_no_p(
    make_results: MakeResults, tmp_path: Path
) -> None:
    report = write(make_results(["topk_8", "bh_strict"], 2), tmp_path)
    assert cells(report, "Statistical tests", "bh_strict")[3:] == ["–", "–", "–", "–", "–"]
    assert "2 complete pairs: tests and intervals need 3." in report


def test_failed_experiments_are_named_and_left_out(
    results: pd.DataFrame, fill_folder: FillFolder
) -> None:
    row = results.index[(results["config_name"] == "bh_loose")][0]
    results.loc[row, ["status", "error"]] = ["failed", "out of memory; try --device cpu"]
    results.loc[row, "avg_experts_per_token"] = np.nan
    report = write(results, fill_folder(results))
    assert "1 of 60 experiments failed" in part(report, "Summary")
    assert "out of memory; try --device cpu" in part(report, "Failed experiments")
    assert "n" not in cells(report, "Statistical tests", "bh_loose")[:1]
    assert cells(report, "Statistical tests", "bh_loose")[0] == "11"


def test_a_run_of_failures_gets_a_report(results: pd.DataFrame, tmp_path: Path) -> None:
    results["status"], results["error"] = "failed", "why"
    report = write(results, tmp_path)
    assert "No experiment finished" in report
    assert "60 of 60 experiments failed" in report


def test_a_summary_of_the_users_own_is_enough(results: pd.DataFrame, tmp_path: Path) -> None:
    report = generate_markdown_report(results, {"mine": 1}, tmp_path).read_text(encoding="utf-8")
    mean = results.loc[results["config_name"] == "bh_strict", "avg_experts_per_token"].mean()
    assert cells(report, "Experts kept", "bh_strict")[0] == f"{mean:.2f}"
    assert "## Statistical tests" not in report


def test_a_large_run_is_cut_to_what_can_be_read(make_results: MakeResults, tmp_path: Path) -> None:
    configs = {"topk_8": 8.0} | {f"bh_{i}": 2 + 0.3 * i for i in range(19)}
    report = write(make_results(configs, 200), tmp_path)
    assert len(report) < 60_000
    assert "19 configurations" in part(report, "Conclusions")


def test_times_of_an_unsteady_machine_are_doubted(results: pd.DataFrame, tmp_path: Path) -> None:
    assert "not steady" not in write(results, tmp_path)
    of_baseline = results["config_name"] == "topk_8"
    results.loc[of_baseline, "decode_time_sec"] *= np.linspace(1.0, 1.6, 12)
    report = write(results, tmp_path)
    assert "The machine was not steady" in part(report, "Time")
    assert "Whether fewer experts save time can't be decided" in part(report, "Conclusions")


def test_results_without_the_needed_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lack the column prompt_text"):
        generate_markdown_report(pd.DataFrame({"config_name": ["a"]}), {}, tmp_path)


def test_whatever_a_template_prints_is_escaped_unless_a_filter_made_it() -> None:
    fill = markdown_report._environment().from_string
    assert fill("{{ text }}").render(text=HOSTILE[:25]) == markdown(HOSTILE[:25])
    assert fill("{{ name|code }} {{ missing|number }}").render(name="a") == "`a` –"
    assert fill("{% filter listed %}{{ text }}¦b¦¦{% endfilter %}").render(text="<i>") == (
        "&lt;i&gt; and b"
    )
    with pytest.raises(UndefinedError, match="'misspelt' is undefined"):
        fill("{{ misspelt }}").render()


def test_the_end_of_a_run_reads_its_folder_once(
    results: pd.DataFrame, fill_folder: FillFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill_folder(results)

    def read_again(*_: Any) -> None:
        raise AssertionError("the folder was read again")

    for module in ("facts", "page"):
        monkeypatch.setattr(f"bh_routing.report.{module}.load_results", read_again)
    monkeypatch.setattr("bh_routing.analysis.results.load_results", read_again)
    steps: list[str] = []

    def attempt(what: str, step: Callable[[], Any]) -> Any:
        steps.append(what)
        return step()

    concluded = conclude_run(folder, attempt)
    assert steps == [
        "reading the results",
        "the analysis",
        "drawing the plots",
        "writing the report",
        "writing the HTML report",
    ]
    assert {"REPORT.md", "report.html", "plots"} <= {path.name for path in folder.iterdir()}
    assert concluded is not None
    # A tracker logs these results, without reading the folder again.
    assert concluded.summary == find_json_object(folder / SUMMARY_JSON)
