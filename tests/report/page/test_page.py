"""The page's content, read without a browser."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bh_routing.errors import InputError, ResultsError
from bh_routing.experiments.token_traces import pack
from bh_routing.report import create_visualizations
from bh_routing.report.charts.style import DARK
from bh_routing.report.page import write_comparison, write_page
from bh_routing.report.traces import read_traces, unpack
from bh_routing.results.records import TokenTrace
from tests.report.conftest import MakeResults
from tests.report.page.conftest import FillPage

HOSTILE = (
    "</script><script>alert(1)</script> \u202eright to left\u202c <b>bold</b> &amp; "
    "\x00 \N{PILE OF POO} =1+1 " + "z" * 10_000
)


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def tips_of(page: Path, chart: str) -> list[str]:
    """What a chart's first view says where the reader points, in the order of drawing."""
    found = re.search(rf'id="{chart}".*?<svg data-tips="([^"]*)"', page.read_text(), re.DOTALL)
    assert found
    return [text for _, _, text in json.loads(html.unescape(found[1]))]


class Tags(HTMLParser):
    """Every tag of a document, in order, and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        self.seen.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]


def parsed(page: Path) -> Tags:
    parser = Tags()
    parser.feed(page.read_text())
    return parser


def tags_of(page: Path) -> list[str]:
    return parsed(page).seen


def test_the_page_is_one_small_file_that_asks_for_nothing(page_folder: Path) -> None:
    page = write_page(page_folder)
    text = page.read_text()
    assert page.name == "report.html"
    assert page.stat().st_size < 1_500_000
    assert all(address.startswith("#") for address in parsed(page).addresses)
    assert "default-src 'none'" in text


def test_three_charts_say_what_the_files_say(page_folder: Path, make_results: MakeResults) -> None:
    page = write_page(page_folder)
    results = make_results()

    summary = json.loads((page_folder / "analysis_summary.json").read_text())
    quality = tips_of(page, "quality_vs_experts")
    for row in summary["quality"]["rules"]:
        change = 100 * (np.exp(row["delta_nll"]) - 1)
        shown = next(text for text in quality if text.startswith(f"{row['config_name']}: "))
        assert f"{row['mean_experts']:.2f} experts, perplexity " in shown
        assert f"+{change:.1f} %" in shown or not change

    split = tips_of(page, "prefill_and_decode")
    mine = results[results["config_name"] == "bh_loose"]
    total = 1000 * (mine["prefill_time_sec"] + mine["decode_time_sec"]).mean()
    assert f"bh_loose: {total:.2f}" in split

    own = [t for t in read_traces(page_folder) if t.config_name == "bh_strict"]
    means_L = np.concatenate([unpack(t).kept.sum(axis=2) for t in own]).mean(axis=0)
    heat = tips_of(page, "experts_by_layer")
    assert [text for text in heat if text.startswith("bh_strict")] == [
        f"bh_strict, layer {layer}: {mean:.2f}" for layer, mean in enumerate(means_L)
    ]


def test_every_chart_of_the_plots_is_on_the_page(page_folder: Path, results: pd.DataFrame) -> None:
    summary = json.loads((page_folder / "analysis_summary.json").read_text())
    plots = create_visualizations(results, page_folder, summary)
    text = write_page(page_folder).read_text()
    assert len(plots) >= 11
    for path in plots:
        assert f'<div class="chart" id="{path.stem}" role="img" aria-label="' in text


def test_colours_of_charts_follow_the_theme(page_folder: Path) -> None:
    text = write_page(page_folder).read_text()
    used = set(re.findall(r"var\((--c[0-9a-f]{6})\)", text))
    assert used
    for theme in (":root{", ":root[data-theme=dark]{"):
        declared = text.split(theme)[1].split("}")[0]
        assert used <= set(re.findall(r"--c[0-9a-f]{6}", declared))
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not [colour for colour in DARK if f": {colour}" in svgs]


def test_a_damaged_calibration_is_reported_and_leaves_the_rest(
    page_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (page_folder / "calibration.safetensors").write_bytes(b"half a file")
    assert 'id="quality_vs_experts"' in write_page(page_folder).read_text()
    assert "lacks the charts of the calibration" in caplog.text


def test_a_trace_survives_packing() -> None:
    expert_TLK = np.array([[[63, 0, 300]]])
    kept_TLK = np.array([[[True, False, False]]])
    weight_TLK = np.array([[[0.5, 0.25, 0.0]]])
    p_TLK = np.array([[[1e-4, 0.5, np.nan]]])
    trace = TokenTrace(
        key="k",
        config_name="a", prompt_text="b", tokens=["c"], num_prompt_tokens=1, layers=1, slots=3,
        model_top_k=2, planes=pack(expert_TLK, kept_TLK, weight_TLK, p_TLK),
    )  # fmt: skip
    slots = unpack(trace)
    assert slots.expert.tolist() == expert_TLK.tolist()
    assert slots.kept.tolist() == kept_TLK.tolist()
    np.testing.assert_allclose(slots.weight, weight_TLK, atol=1e-5)
    np.testing.assert_allclose(slots.p, p_TLK, rtol=2e-3)


def test_hostile_texts_add_no_markup(fill_page: FillPage, make_results: MakeResults) -> None:
    harmless = tags_of(write_page(fill_page(make_results(num_prompts=3))))
    results = make_results(num_prompts=3)
    for column in ("prompt_text", "generated_text", "prompt_category"):
        results[column] = HOSTILE + results[column]
    page = write_page(fill_page(results))
    assert tags_of(page).count("script") == harmless.count("script")
    assert "b" not in tags_of(page)
    assert data_of(page)["experiments"]["prompts"][0] == results["prompt_text"][0]


def test_a_run_without_finished_experiments_or_details_still_has_a_page(
    fill_page: FillPage, make_results: MakeResults
) -> None:
    results = make_results(num_prompts=1)
    results["status"], results["error"] = "failed", "out of memory"
    folder = fill_page(results)
    for name in ("records.jsonl", "token_traces.jsonl", "analysis_summary.json", "run.json"):
        (folder / name).unlink()
    assert "No experiment finished" in write_page(folder).read_text()


def test_a_damaged_trace_is_named(page_folder: Path) -> None:
    (page_folder / "token_traces.jsonl").write_text('{"tokens": []}\n')
    with pytest.raises(ResultsError, match="line 1 isn't a record"):
        write_page(page_folder)


@pytest.mark.full
def test_twenty_configurations_on_two_hundred_prompts_stay_small(
    fill_page: FillPage, make_results: MakeResults
) -> None:
    names = {f"bh_{i}": 4.0 for i in range(19)} | {"topk_8": 8.0}
    page = write_page(fill_page(make_results(names, num_prompts=200)))
    assert page.stat().st_size < 15_000_000
    assert len(data_of(page)["experiments"]["rows"]) == 4_000


def test_a_comparison_names_what_differs(page_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("bh_routing_results.csv", "analysis_summary.json", "records.jsonl"):
        (other / name).write_bytes((page_folder / name).read_bytes())
    run = json.loads((page_folder / "run.json").read_text())
    run["spec"]["max_tokens"], run["provenance"]["seed"] = 51, 1
    (other / "run.json").write_text(json.dumps(run))
    text = write_comparison([page_folder, other], tmp_path / "cmp.html").read_text()
    assert "spec.max_tokens" in text
    assert "provenance.seed" in text
    assert "spec.configs.topk_8.k" not in text
    assert 'id="compared_quality"' in text
    assert "bh_strict: 3.40 experts, perplexity +47.6 %" in text


def test_a_comparison_of_one_folder_is_refused(page_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two results folders or more, got 1"):
        write_comparison([page_folder], tmp_path / "cmp.html")
    with pytest.raises(InputError, match="named twice"):
        write_comparison([page_folder, page_folder], tmp_path / "cmp.html")
