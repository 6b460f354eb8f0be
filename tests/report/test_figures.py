from __future__ import annotations

import copy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from bh_routing.analysis.results import Results
from bh_routing.errors import InputError
from bh_routing.report import create_visualizations, findings
from bh_routing.report.charts import draw_charts
from bh_routing.report.charts.style import FIXED_LOOKS, OTHER_COLOURS, looks_of, save
from bh_routing.report.facts import Facts, facts_of, read_facts
from bh_routing.report.quality import QualityFindings, quality_findings, reference_at
from bh_routing.results.records import TIMING_COLUMNS, TIMINGS

MakeResults = Callable[..., pd.DataFrame]
REQUIRED = {
    "avg_experts_comparison.png",
    "inference_time_comparison.png",
    "expert_utilization_cv.png",
    "experts_by_category.png",
    "experts_vs_latency.png",
}
SPLIT = {"prefill_and_decode.png"}


def draw(results: pd.DataFrame, folder: Path, **summary: Any) -> dict[str, np.ndarray]:
    paths = create_visualizations(results, folder, summary)
    assert all(path.parent == folder / "plots" for path in paths)
    return {path.name: imread(path) for path in paths}


def test_the_five_plots_and_the_quality_plot_are_drawn(
    results: pd.DataFrame, quality: dict[str, Any], tmp_path: Path
) -> None:
    assert set(draw(results, tmp_path)) == REQUIRED | SPLIT
    images = draw(results, tmp_path, quality=quality)
    on_text = {"quality_vs_experts.png", "load_on_evaluation_text.png"}
    assert set(images) == REQUIRED | SPLIT | on_text
    for image in images.values():
        assert image.shape[1] == 810  # 5.4 inches at 150 dots: legible at half a page
        assert image[:, :, :3].std() > 0.05  # not blank


def test_nothing_is_left_behind_but_the_plots(results: pd.DataFrame, tmp_path: Path) -> None:
    draw(results, tmp_path)
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= REQUIRED


@pytest.mark.parametrize(
    ("configs", "num_prompts"), [(["topk_8"], 1), (["bh_only"], 1), (["topk_8", "bh"], 2)]
)
def test_the_smallest_runs_are_drawn(
    make_results: MakeResults, tmp_path: Path, configs: list[str], num_prompts: int
) -> None:
    assert set(draw(make_results(configs, num_prompts), tmp_path)) >= REQUIRED


def test_a_large_run_is_drawn(make_results: MakeResults, tmp_path: Path) -> None:
    configs = {f"a_configuration_with_a_long_name_{i}": 2.0 + 0.3 * i for i in range(20)}
    images = draw(make_results(configs, 200), tmp_path)
    assert max(image.shape[0] for image in images.values()) <= 14 * 150


def test_missing_numbers_and_failed_rows_are_left_out(
    results: pd.DataFrame, tmp_path: Path
) -> None:
    numbers = results.select_dtypes("number").columns
    results[numbers] = results[numbers].astype(float)
    results.loc[results.index[::3], numbers] = np.nan
    results.loc[results.index[1::7], ["status", "error"]] = ["failed", "out of memory"]
    assert set(draw(results, tmp_path)) >= REQUIRED
    results[numbers] = np.nan
    assert set(draw(results, tmp_path)) >= REQUIRED


def test_a_run_without_a_finished_experiment_still_has_its_plots(
    results: pd.DataFrame, tmp_path: Path
) -> None:
    results["status"] = "failed"
    assert set(draw(results, tmp_path)) >= REQUIRED
    assert set(draw(results.iloc[:0], tmp_path)) >= REQUIRED


def test_names_are_text_and_never_formulas(make_results: MakeResults, tmp_path: Path) -> None:
    results = make_results(["topk_8", "$\\frac{", "<b>&", "漢字", "\x00\u202e", "n" * 500], 4)
    results["prompt_category"] = ["$x$", "^_", "\n", ""] * 6
    assert set(draw(results, tmp_path)) >= REQUIRED


def test_a_table_without_the_needed_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="avg_experts_per_token"):
        create_visualizations(pd.DataFrame({"config_name": [], "prompt_text": []}), tmp_path)


def test_nobodys_settings_or_windows_change(tmp_path: Path) -> None:
    """In a fresh interpreter: pyplot isn't loaded, and a setting of the caller survives."""
    program = f"""
import sys
import matplotlib as mpl
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import build_results
from bh_routing.report import create_visualizations
mpl.rcParams["font.size"] = 7.5
before = dict(mpl.rcParams)
create_visualizations(build_results(), {str(tmp_path)!r})
assert dict(mpl.rcParams) == before, "settings changed"
assert "matplotlib.pyplot" not in sys.modules, "pyplot was loaded"
assert "torch" not in sys.modules, "torch was loaded"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_six_plots_take_at_most_four_seconds_of_one_core(
    results: pd.DataFrame, quality: dict[str, Any], tmp_path: Path
) -> None:
    create_visualizations(results.head(1), tmp_path)  # loads fonts
    start = time.process_time()
    create_visualizations(results, tmp_path, {"quality": quality})
    assert time.process_time() - start <= 4.0


def test_the_standard_configurations_keep_their_colours() -> None:
    assert looks_of(["new", *FIXED_LOOKS])["bh_strict"] == FIXED_LOOKS["bh_strict"]
    fixed = {colour for colour, _ in FIXED_LOOKS.values()}
    assert len(fixed | set(OTHER_COLOURS)) == len(FIXED_LOOKS) + len(OTHER_COLOURS)


def test_a_failed_write_leaves_the_old_plot(results: pd.DataFrame, tmp_path: Path) -> None:
    path = create_visualizations(results, tmp_path)[0]
    old = path.read_bytes()

    class Broken(Figure):
        def savefig(self, *args: Any, **kwargs: Any) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save(Broken(), path)
    assert path.read_bytes() == old
    assert not list(path.parent.glob(".*"))


def facts_about(results: pd.DataFrame) -> Facts:
    return facts_of(Results(folder=Path(), experiments=results), {})


def test_titles_state_the_numbers(results: pd.DataFrame) -> None:
    facts = facts_about(results)
    means = results.groupby("config_name")["avg_experts_per_token"].mean()
    title = findings.experts(facts)
    assert f"{means['bh_strict']:.2f} (bh_strict)" in title
    assert f"{means['bh_loose']:.2f} (bh_loose)" in title
    assert "topk_8 keeps 8.00" in title
    assert "slower" in findings.time(facts)


def test_a_title_claims_no_difference_in_time_that_prompts_do_not_show(
    make_results: MakeResults,
) -> None:
    results = make_results({"topk_8": 8.0, "bh": 4.0}, 12)
    rng = np.random.default_rng(0)
    results["inference_time_sec"] = rng.normal(1.0, 0.2, len(results))
    assert findings.time(facts_about(results)).startswith("No clear difference")
    assert "did not clearly save" in findings.latency(facts_about(results))


def test_pictures_of_time_show_the_rounds_that_their_titles_speak_of(
    make_results: MakeResults, tmp_path: Path
) -> None:
    results = make_results({"topk_8": 8.0, "bh": 4.0}, 4)
    results["inference_time_sec"] *= np.where(results["config_name"] == "bh", 3.0, 1.0)
    shares = [0.8, 0.7, 0.75]
    rounds = [
        (name, number, name, "text", 5, 1, share, 0.0)
        for number, factor in enumerate(shares, start=1)
        for name, share in (("topk_8", 1.0), ("bh", factor))
    ]
    pd.DataFrame(rounds, columns=list(TIMING_COLUMNS)).to_csv(tmp_path / TIMINGS, index=False)
    facts = read_facts(results, {}, tmp_path)
    assert "faster" in findings.time(facts)
    charts = draw_charts(facts)["time"]
    bars = charts["inference_time_comparison"].picture().axes[0].patches
    mean = 100 * np.exp(np.mean(np.log(shares)))
    widths = [bar.get_width() for bar in bars if isinstance(bar, Rectangle)]
    assert widths == pytest.approx([100.0, mean])
    lines = charts["experts_vs_latency"].picture().axes[0].get_lines()
    markers = [line for line in lines if line.get_marker() != "None"]
    heights = [float(np.asarray(line.get_ydata())[0]) for line in markers]
    assert heights == pytest.approx([100.0, mean])
    assert set(draw(results, tmp_path)) >= REQUIRED
    header = (tmp_path / TIMINGS).read_text().splitlines()[0]
    (tmp_path / TIMINGS).write_text(f"{header}\na,1,topk_8,text,5,1,0.0,0.0\n")
    assert set(draw(results, tmp_path)) >= REQUIRED


@pytest.mark.parametrize("names", [1, 2])
@pytest.mark.parametrize("categories", [4, 13])
@pytest.mark.parametrize(
    "name", ["bh_drop:alpha=0.1705,scope=population", "x" * 150, "several words " * 12]
)
def test_long_names_leave_every_plot_room(
    name: str, categories: int, names: int, make_results: MakeResults, tmp_path: Path
) -> None:
    # Warnings are errors here: matplotlib warns where a plot's labels leave no room for its axes.
    configs = {name: 4.0} if names == 1 else {name: 4.0, f"{name}2": 5.0}
    results = make_results(configs, categories)
    results["prompt_category"] = results["prompt_text"].str.replace("Prompt", "a long category,")
    assert set(draw(results, tmp_path)) >= REQUIRED


def test_no_title_compares_times_of_an_unsteady_machine(results: pd.DataFrame) -> None:
    assert not findings.is_unsteady(facts_about(results))
    of_baseline = results["config_name"] == "topk_8"
    results.loc[of_baseline, "decode_time_sec"] *= np.linspace(1.0, 1.6, 12)
    facts = facts_about(results)
    assert findings.is_unsteady(facts)
    assert "unsteady speed" in findings.time(facts)
    assert "varied too much" in findings.latency(facts)


def test_static_top_k_is_known_by_its_rule_whatever_it_is_called(quality: dict[str, Any]) -> None:
    names = {"topk_5": "five", "bh_loose": "bh_vs_topk8", "bh_strict": "topk_3"}
    rules = {"bh_moderate": "per_layer_top_k", "bh_adaptive": "random_k"}
    block = copy.deepcopy(quality)
    for row in block["rules"]:
        row["rule"] = rules.get(row["config_name"], row["rule"])
        row["config_name"] = names.get(row["config_name"], row["config_name"])
    rows = quality_findings({"quality": block}).rows
    assert {row.config_name for row in rows if row.is_static} == {"topk_8", "five", "topk_4"}
    static = {row.mean_experts: row.delta_nll for row in rows if row.is_static}
    assert reference_at(rows, 4.5) == pytest.approx((static[4.0] + static[5.0]) / 2)


def test_the_quality_title_says_so_if_static_top_k_is_better(quality: dict[str, Any]) -> None:
    found = quality_findings({"quality": quality})
    assert "that of static top-k is lower at the same mean" in findings.quality(found)
    rows = [row for row in found.rows if row.is_static or row.config_name == "bh_loose"]
    better = QualityFindings(rows=rows, answers=found.answers)
    assert "static" not in findings.quality(better)  # nothing was scored at that mean


def test_the_quality_title_counts_both_sides_of_static_top_k(quality: dict[str, Any]) -> None:
    found = quality_findings({"quality": quality})
    (rows,) = found.against["no"]
    answers = dict(found.answers) | {rows[0].config_name: "yes"}
    both = QualityFindings(rows=found.rows, answers=answers)
    title = findings.quality(both)
    assert title.endswith(
        f"; of {len(rows)} configurations {len(rows) - 1} clearly above and 1 clearly below "
        "static top-k"
    )
