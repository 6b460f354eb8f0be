"""The published null ablation is what was measured, and the negative controls come out as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.null_ablation import BLOCK, HERE, METHOD, main, render
from bh_routing.experiments.evidence_parts import ALPHAS, null_rules
from bh_routing.nulls import NULLS

RESULTS = json.loads((HERE / "null_ablation.json").read_text(encoding="utf-8"))
ROWS: dict[str, dict[str, Any]] = {row["name"]: row for row in RESULTS["rows"]}


@pytest.mark.parametrize("page", [METHOD, HERE / "null_ablation.md"], ids=lambda page: page.name)
def test_the_page_shows_the_measured_table(page: Path) -> None:
    assert render(RESULTS) in page.read_text(encoding="utf-8")
    assert len(BLOCK.findall(METHOD.read_text(encoding="utf-8"))) == 1


def test_every_null_is_measured_at_every_alpha_or_refused() -> None:
    known = ROWS.keys() | RESULTS["refused"].keys()
    assert set(null_rules()) <= known
    assert all(f"bh, {null} | α = {alpha:.2f}" in known for null in NULLS for alpha in ALPHAS)
    assert all("out of the calibration's reach" in why for why in RESULTS["refused"].values())


def test_the_negative_controls_keep_one_expert() -> None:
    for alpha in ALPHAS:
        assert ROWS[f"bh, softmax | α = {alpha:.2f}"]["mean_experts"] == 1.0
        assert ROWS[f"bh, pooled | α = {alpha:.2f}"]["mean_experts"] < 1.2


def test_bh_drop_loses_less_than_static_top_k_there_and_background_more() -> None:
    for alpha in ALPHAS:
        drop, select = (
            ROWS[f"{name} | α = {alpha:.2f}"]
            for name in ("bh_drop, needed, sensitivity", "bh, background")
        )
        assert drop["delta_nll"] < drop["top_k_delta_nll"]
        assert select["delta_nll_low"] > select["top_k_delta_nll"]


@pytest.mark.full
def test_the_command_runs_on_a_little_text(tmp_path: Path) -> None:
    arguments = ["--tokens", "100", "--fit-tokens", "6000", "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path / "small")]) == 0
    results = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    assert set(null_rules()) <= {r["name"] for r in results["rows"]} | set(results["refused"])
