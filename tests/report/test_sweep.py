"""The report of a sweep: every number from a row, every name harmless."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bh_routing.analysis.quality import QualityOptions
from bh_routing.analysis.sweep import SweepTables, compare_points
from bh_routing.analysis.sweep_records import read_sweep
from bh_routing.cli.main import main
from bh_routing.report.charts.marks import percent_change
from bh_routing.report.charts.style import rendered
from bh_routing.report.charts.sweep import domains, pareto
from bh_routing.report.sweep import conclude_sweep, render_sweep
from bh_routing.report.sweep_findings import domains_title, pareto_title, series_label
from tests.analysis.scored import scored_documents
from tests.analysis.swept import (
    STATIC_LOSSES,
    point,
    usual_points,
    usual_records,
    with_experts,
    write_sweep,
)

FEW = QualityOptions(resamples=1000)
HOSTILE = "<b>|`x`|\n$\\frac$ \u202eevil =cmd()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"), usual_points(), usual_records(24))


@pytest.fixture(scope="module")
def written(folder: Path) -> list[Path]:
    return conclude_sweep(folder, FEW)


@pytest.fixture(scope="module")
def tables(folder: Path) -> SweepTables:
    return compare_points(read_sweep(folder), FEW)


def verdict(tables: SweepTables) -> list[str]:
    """The paragraphs of the report's first section."""
    text = render_sweep(tables).split("## Verdict\n\n")[1].split("\n\n## ")[0]
    return text.split("\n\n")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def drawn_points(axes: Axes) -> set[tuple[float, float]]:
    """Points of everything that is drawn in data coordinates."""
    lines = [line for line in axes.get_lines() if line.get_transform() == axes.transData]
    points = np.concatenate([np.asarray(line.get_xydata()) for line in lines])
    return {(round(float(x), 9), round(float(y), 9)) for x, y in points}


def test_all_files_are_written_and_the_same_again(
    folder: Path, written: list[Path], tmp_path: Path
) -> None:
    names = [str(path.relative_to(folder)) for path in written]
    assert names == [
        "points.csv", "points_by_domain.csv", "comparisons.csv", "SWEEP.md", "plots/pareto.png",
        "plots/pareto_domains.png",
    ]  # fmt: skip
    again = conclude_sweep(write_sweep(tmp_path, usual_points(), usual_records(24)), FEW)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]


def test_a_missing_number_is_an_empty_cell_of_every_table(written: list[Path]) -> None:
    tables = [rows_of(path) for path in written if path.suffix == ".csv"]
    cells = [[cell for row in rows for cell in row.values()] for rows in tables]
    assert len(tables) == 3 and all("" in own and "nan" not in own for own in cells)


def test_report_of_a_sweeps_folder_writes_the_same_tables(tmp_path: Path) -> None:
    # An older version left its tables.
    folder = write_sweep(tmp_path / "old", usual_points(), usual_records(6), provenance={"seed": 7})
    (folder / "sweep.csv").write_text("rule,beats_top_k\n")
    assert main(["report", str(folder)]) == 0
    direct = write_sweep(tmp_path / "new", usual_points(), usual_records(6))
    conclude_sweep(direct, QualityOptions(seed=7))
    for name in ("points.csv", "points_by_domain.csv", "comparisons.csv"):
        assert (folder / name).read_bytes() == (direct / name).read_bytes()


def test_report_names_options_that_a_sweep_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sweep(tmp_path, usual_points(), usual_records(4))
    assert main(["report", str(folder), "--output", "page.html"]) == 2
    assert "leave out --output and --track" in capsys.readouterr().err
    assert not (folder / "SWEEP.md").exists()


def test_report_of_a_sweep_that_is_not_whole_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sweep(tmp_path, usual_points(), usual_records(4))
    (folder / "quality.jsonl").unlink()
    assert main(["report", str(folder)]) != 0
    assert "holds no quality.jsonl" in capsys.readouterr().err


def test_every_value_of_the_pictures_is_in_a_row(
    written: list[Path], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path) -> Path:
        figures.append(figure)
        return path

    monkeypatch.setattr("bh_routing.report.sweep.save", keep)
    conclude_sweep(folder, FEW)
    for figure, name in zip(figures, ("points.csv", "points_by_domain.csv"), strict=True):
        rows = rows_of(folder / name)
        expected = {
            (round(float(r["mean_experts"]), 9), round(percent_change(float(r["delta_nll"])), 9))
            for r in rows
        }
        panels = figure.axes[:1] if name == "points.csv" else figure.axes
        assert set.union(*map(drawn_points, panels)) == expected
    saved = {
        round(100 * float(r["saved"]), 9)
        for r in rows_of(folder / "comparisons.csv")
        if (r["reference"], r["domain"]) == ("top_k", "all") and float(r["saved"] or "nan") > -0.4
    }
    below = figures[0].axes[1]
    assert {y for _, y in drawn_points(below)} - {0.0} == saved


def test_numbers_of_the_report_are_those_of_the_tables(written: list[Path], folder: Path) -> None:
    text = (folder / "SWEEP.md").read_text(encoding="utf-8")
    ranked = [r for r in rows_of(folder / "points.csv") if r["rank"] == "1"]
    best = next(r for r in ranked if r["budget"] == "5.0")
    assert best["config_name"] == "bh_drop-block@5"
    compared = next(
        r
        for r in rows_of(folder / "comparisons.csv")
        if (r["config_name"], r["reference"], r["domain"]) == (best["config_name"], "top_k", "all")
    )
    assert f"saves {100 * float(compared['saved']):.0f} %" in text
    for row in rows_of(folder / "points.csv"):
        assert f"{float(row['delta_nll']):+.4f}" in text
    assert "bh-routing sweep --model demo --budget 6 --budget 5" in text


def test_the_verdict_is_three_sentences_that_follow_the_statistics(tables: SweepTables) -> None:
    first, second, third = verdict(tables)
    assert "perplexity: nothing could be compared at 6; `bh_drop block` saves" in first
    assert "at 5.05 experts (joint" in first
    assert "the same points have a lower perplexity at 5 and 4 experts" in second
    assert "than static top-k at 5 and 4 experts and than top-p at 5 and 4 experts" in third
    assert pareto_title(tables).startswith("The best rule saves")


def test_a_rule_that_wins_nowhere_is_not_praised(tmp_path: Path) -> None:
    records = [r for r in usual_records(24) if not r.config_name.startswith(("bh_drop", "top_p"))]
    points = [p for p in usual_points() if p["rule"] == "bh"]
    found = compare_points(read_sweep(write_sweep(tmp_path, points, records)), FEW)
    assert pareto_title(found) == (
        "No rule has a clearly lower loss than static top-k with as many experts"
    )
    first, second = verdict(found)
    assert "adds" in first
    assert "saves" not in first
    assert "nothing can be compared at 5 and 4 experts" in second
    assert "**yes**" not in render_sweep(found)


def test_a_bh_rule_that_loses_clearly_is_said_to(tmp_path: Path) -> None:
    records = [r for r in usual_records(24) if not r.config_name.startswith("bh_drop")]
    for budget in (5, 4):
        own = scored_documents(f"bh_drop-block@{budget}", delta=0.9, documents=24)
        records += with_experts(own, budget)
    found = compare_points(read_sweep(write_sweep(tmp_path, usual_points(), records)), FEW)
    sentence = verdict(found)[-1]
    assert "has a clearly higher perplexity than static top-k at 5 and 4 experts" in sentence
    assert "than that of static top-k: 0 of 2 at 5 and 0 of 2 at 4" in sentence


def doubtful(tables: SweepTables, *domains: str) -> SweepTables:
    """Return the tables with intervals against static top-k that include 0 in these domains."""
    found = {
        key: replace(one, high=0.01) if key[1] == "top_k" and key[2] in domains else one
        for key, one in tables.found.items()
    }
    return replace(tables, found=found)


def test_domains_are_counted_by_their_intervals(tables: SweepTables) -> None:
    assert domains_title(tables) == (
        "The best rule has a clearly lower loss than static top-k in all 2 domains, at every budget"
    )
    assert "in no domain" in domains_title(doubtful(tables, "prose", "code"))
    assert "in 1 of 2 domains" in domains_title(doubtful(tables, "prose"))


def test_only_points_that_were_scored_are_said_to_keep_their_budget(tables: SweepTables) -> None:
    rows = [replace(row, off_budget=False) for row in tables.points]
    unscored = replace(rows[0], mean_experts=math.nan)
    every = "is within 2 % of its budget"
    assert f"Every point {every}" in render_sweep(replace(tables, points=tuple(rows)))
    assert f"Every scored point {every}" in render_sweep(replace(tables, points=(*rows, unscored)))
    assert every not in render_sweep(replace(tables, points=(unscored,), by_domain=()))


def test_the_report_asks_every_rule_whether_it_beats_each_reference(tmp_path: Path) -> None:
    records = usual_records(24)
    for k in (6, 5, 4):
        own = scored_documents(f"per_layer_top_k@{k}", delta=0.9 * STATIC_LOSSES[k], documents=24)
        records += with_experts(own, k)
    points = [*usual_points(), *(point("per_layer_top_k", k) for k in (5, 4))]
    beyond = [point("per_layer_top_k", 6)]
    typed = {"command": "bh-routing sweep --budget 6 --output 'a b'"}
    folder = write_sweep(tmp_path, points, records, curve_points=beyond, provenance=typed)
    text = render_sweep(compare_points(read_sweep(folder), FEW))
    names = ("static top-k", "top-p", "per-layer top-k")
    asked = " | ".join(f"lower than {name}" for name in names)
    assert f"| budget | rule | experts | ΔPPL | {asked} |" in text
    assert re.search(r"\| 5 \| `bh_drop block` \|[^|]*\|[^|]*(\| \*\*yes\*\* [^|]*){3}\|", text)
    assert "**Against per-layer top-k** the same points have a lower perplexity at" in text
    assert "    bh-routing sweep --budget 6 --output 'a b'\n" in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    records = usual_records(4)
    own = scored_documents("hostile", delta=0.1, documents=4)
    records += with_experts(own, 5.05)
    hostile = point("bh_drop", 5, variant=HOSTILE, config_name="hostile", unreachable=HOSTILE)
    folder = write_sweep(tmp_path, [*usual_points(), hostile], records, model={"name": HOSTILE})
    conclude_sweep(folder, FEW)
    text = (folder / "SWEEP.md").read_text(encoding="utf-8")
    assert "<b>" not in text
    assert "\u202e" not in text
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line[:1] == "|"]
    assert set(widths) <= {3, 7, 11, 14}
    assert "--model MODEL" in text
    kept = next(r for r in rows_of(folder / "points.csv") if r["config_name"] == "hostile")
    assert kept["variant"] == HOSTILE


def test_a_variant_named_after_its_rule_is_named_once(tables: SweepTables) -> None:
    row = next(row for row in tables.points if row.variant == "block")
    assert series_label(row) == "bh_drop block"


def test_pictures_of_nothing_are_still_pictures(tables: SweepTables) -> None:
    unknown = tuple(replace(row, delta_nll=math.nan) for row in tables.points)
    unknown_tables = replace(tables, points=unknown, found={})
    empty = replace(tables, points=(), by_domain=(), found={})
    charts = (
        pareto(empty, "Nothing"),
        pareto(unknown_tables, "Nothing"),
        domains(empty, "Nothing"),
    )
    for chart in charts:
        assert rendered(chart.picture(), "png").startswith(b"\x89PNG")


def test_a_rule_that_loses_far_more_stands_at_the_edge(tables: SweepTables) -> None:
    bad = {row.config_name for row in tables.points if row.rule == "bh" and not row.is_curve_only}
    found = {
        key: replace(one, saved=-3.0) if key[0] in bad else one for key, one in tables.found.items()
    }
    below = pareto(replace(tables, found=found), "Edge").picture().axes[1]
    assert below.get_ylim()[0] > -60
    triangles = [line for line in below.get_lines() if line.get_marker() == "v"]
    at_edge = [line for line in triangles if line.get_transform() != below.transData]
    assert len(at_edge) == len(bad)
