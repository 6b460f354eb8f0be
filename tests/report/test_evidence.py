"""The tables of evidence of several models, and the published page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence as published
from bh_routing.report.evidence import CLAIMS, POPULATION, STEPS, render_evidence

POPULATION_CLAIM = "Population BH has a lower loss than static top-k at equal experts per token"
STEP_CLAIM = "Per step of 16, `bh_drop` step_population, refilled, has a lower loss than OEA"
BOUND_CLAIM = "`bh_drop` per token: of a token's drops, at most α·π₀ mattered on average"
REAP_CLAIM = "Pruned by Fisher mass, a model has a lower loss than by REAP"


def compared(variant: str, reference: str, answers: dict[float, str]) -> dict[str, Any]:
    """A sweep's table with one variant, compared with one reference at each budget."""
    point = {"rule": "", "variant": variant, "mean_experts": 5.0, "mean_distinct_experts": 40.0}
    loss = {"delta_nll": 0.1, "delta_nll_low": 0.05, "delta_nll_high": 0.15}
    saved = {"saved": 0.3, "saved_low": 0.2, "saved_high": 0.4, "p_corrected": 0.01}
    return {
        "points": [point | loss | {"budget": budget} for budget in answers],
        "comparisons": [
            {"variant": variant, "budget": budget, "reference": reference, "answer": answer} | saved
            for budget, answer in answers.items()
        ],
    }


def model(**parts: Any) -> dict[str, Any]:
    return {
        "protocol": {"model": "m", "calibration_tokens": 5000},
        "model": {
            "num_parameters": 10**7, "num_layers": 2, "num_experts": 64, "model_top_k": 8,
            "dtype": "float32", "device_name": "cpu",
        },
        "provenance": {
            "bh_routing": "1", "torch": "2", "transformers": "5", "seed": 0,
            "started_at": "2026-11-30T12:00:00+00:00",
        },
        "scored_tokens": 100,
        "parts": {part: {"reason": None, "seconds": 60.0} for part in parts},
        **parts,
    }  # fmt: skip


def row_of(page: str, begin: str) -> list[str]:
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {begin}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("small", "large", "cells", "survives"),
    [
        (["yes", "yes"], ["yes", "yes"], ["2 of 2", "2 of 2"], "**yes**"),
        (["yes", "yes"], ["yes", "undecided"], ["2 of 2", "1 of 2"], "undecided"),
        (["yes", "yes"], ["no", "yes"], ["2 of 2", "1 of 2, the opposite in 1"], "no"),
    ],
)
def test_a_conclusion_survives_if_it_holds_in_every_case_of_every_model(
    small: list[str], large: list[str], cells: list[str], survives: str
) -> None:
    page = render_evidence(
        {
            name: model(equal_cost=compared(POPULATION, "top_k", {6: answers[0], 4: answers[1]}))
            for name, answers in (("small", small), ("large", large))
        }
    )
    _, *found, verdict = row_of(page, POPULATION_CLAIM)
    shown = "30 % [20, 40]; 30 % [20, 40]"
    assert found == [f"{cell}: {shown}" for cell in cells]
    assert verdict == survives


def test_a_claim_on_bh_select_is_not_one_on_bh_drop() -> None:
    table = compared("bh", "top_k", {6: "no"})
    other = compared("bh_drop-sensitivity", "top_k", {6: "yes"})
    both = {name: table[name] + other[name] for name in table}
    page = render_evidence({"small": model(equal_cost=both)})
    assert row_of(page, "BH-select (`bh`)")[1].startswith("1 of 1: ")
    assert row_of(page, "`bh_drop` per token has")[1].startswith("1 of 1: ")


def test_a_conclusion_that_one_model_lacks_was_not_measured() -> None:
    steps = model(decode_steps=compared(f"{STEPS}16", "oea", {0.65: "yes"}))
    page = render_evidence(
        {"small": steps, "large": model(nulls={"rules": [], "out_of_reach": {}})}
    )
    assert row_of(page, STEP_CLAIM)[-1] == "not measured"


def test_models_of_other_refills_share_the_claim_and_not_the_rows() -> None:
    models = {
        "eight": model(decode_steps=compared(f"{STEPS}16", "oea", {0.65: "yes"})),
        "two": model(decode_steps=compared(f"{STEPS}4", "oea", {0.65: "yes"})),
    }
    page = render_evidence(models)
    assert row_of(page, STEP_CLAIM)[-1] == "**yes**"
    assert page.count("| 65 % | ") == 2


@pytest.mark.parametrize(
    ("low", "high", "cell"),
    [(0.01, 0.02, "1 of 1"), (0.01, 0.04, "0 of 1"), (0.03, 0.04, "0 of 1, the opposite in 1")],
)
def test_the_bound_on_wrong_drops_holds_if_the_whole_interval_lies_below(
    low: float, high: float, cell: str
) -> None:
    row = {
        "variant": "bh_drop token, sensitivity, norm", "alpha": 0.05, "share_mattered": 0.5,
        "mean_experts": 7.0, "per_token": {"estimate": 0.02, "low": low, "high": high},
    }  # fmt: skip
    page = render_evidence({"small": model(wrong_drops=[row])})
    assert row_of(page, BOUND_CLAIM)[1] == cell


def test_a_failed_part_stands_with_its_reason_under_its_model() -> None:
    found = model(pruning=[])
    found["parts"]["nulls"] = {"reason": "no | gradients", "seconds": 1.0}
    found["parts"]["wrong_drops"] = None
    page = render_evidence({"small": found})
    assert "- small: `nulls` failed: no \\| gradients" in page
    assert "- small: `wrong_drops` wasn't run" in page


def test_the_published_page_shows_what_was_measured() -> None:
    models = published.stored()
    for page, block in (
        (published.PAGE, published.render(models)),
        (published.README, published.summarize(models)),
    ):
        text = page.read_text(encoding="utf-8")
        assert len(published.BLOCK.findall(text)) == 1
        assert f"-->\n{block}<!-- evidence: end -->" in text
    assert CLAIMS[POPULATION_CLAIM](models["packaged"])


def test_the_loss_curve_is_drawn_from_training_json(tmp_path: Path) -> None:
    curve = [{"tokens": 1000 * step, "train_nll": 9.0 / step} for step in range(1, 60)]
    curve[40]["heldout_nll"] = 0.5
    published.draw_loss_curve({"curve": curve, "heldout_nll": 0.4}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
