"""`bh-routing run --model M` with its defaults finishes on a model of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bh_routing.analysis.results import load_results
from bh_routing.cli.main import main
from bh_routing.models import find_routers
from bh_routing.models.families import family_rows
from bh_routing.models.outlook import outlook_from_config, outlook_from_routers
from bh_routing.results.records import BASELINE, LEFT_OUT
from tests.families.checkpoints import save_tiny
from tests.families.checks import family_subject
from tests.families.misses import REFUSED
from tests.families.zoo import family_names

BH = ("bh_strict", "bh_moderate", "bh_loose", "bh_adaptive")
ROWS = {row["family"]: row for row in family_rows()}
ROUTED = tuple(name for name in family_names() if name not in REFUSED)
NO_TEXT = ("diffusion_gemma", "openai_privacy_filter")
"""Families that can be routed and generate nothing."""
ORDINARY = (
    "deepseek_v2",  # softmax, groups of experts first
    "deepseek_v3",  # sigmoid, bias, groups, shared experts
    "deepseek_v4",  # no more experts than its own k; experts by token id in one layer
    "dbrx",  # its k stands in a part of its configuration
    "gemma4",  # a gain of each expert
    "gpt_oss",  # a bias in the logits
    "inkling",  # shared experts within the normalised sum
    "mixtral",
    "qwen3_vl_moe",  # multimodal
    "zaya",  # top-1, and a class that is no expert
)
every_family = pytest.mark.parametrize(
    "family",
    [
        name if name in ORDINARY else pytest.param(name, marks=pytest.mark.full)
        for name in ROUTED
        if name not in NO_TEXT
    ],
)


SHORT = (
    *("--device", "cpu", "--prompts", "1,3", "--max-tokens", "2", "--tokens", "120"),
    *("--timing-rounds", "1", "--token-traces", "1"),
)
"""Flags that make a run short; none of them chooses a configuration."""


@every_family
def test_the_documented_command_finishes(family: str, tmp_path: Path) -> None:
    model, output = save_tiny(family, tmp_path / "model"), tmp_path / "results"
    assert main(["run", "--model", str(model), "--output", str(output), *SHORT]) == 0
    results = load_results(output)
    k = results.run["model"]["model_top_k"]
    baseline = f"topk_{k}"
    runs = [name for name in BH if name not in results.run[LEFT_OUT]]
    assert list(results.run["spec"]["configs"]) == [baseline, *runs]
    assert results.run[BASELINE] == baseline == (results.summary or {})[BASELINE]
    temperature_1_only = "temperature 1 only" in ROWS[family]["limits"]
    assert list(results.run[LEFT_OUT]) == (["bh_adaptive"] if temperature_1_only else [])
    experts = results.experiments.groupby("config_name")["max_experts"].max()
    assert experts[baseline] == k
    assert experts.max() <= k
    report = (output / "REPORT.md").read_text(encoding="utf-8")
    assert f"`{baseline}`, the model's own top-{k}, keeps {k}.00 experts" in report
    assert ("**Left out**: `bh_adaptive`" in report) == temperature_1_only


@pytest.mark.parametrize("family", ROUTED)
def test_the_configuration_file_says_what_the_probe_finds(family: str) -> None:
    model: Any = family_subject(family).model
    found = outlook_from_routers(model.config.model_type, find_routers(model))
    assert outlook_from_config(model.config) == found


@pytest.mark.parametrize("family", NO_TEXT)
def test_a_model_that_generates_no_text_is_rejected_at_once(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family_subject(family).model.config.save_pretrained(tmp_path / "model")  # no weights
    output = tmp_path / "results"
    assert main(["run", "--model", str(tmp_path / "model"), "--output", str(output)]) == 2
    assert "generates no text" in capsys.readouterr().err
    assert not output.exists()
