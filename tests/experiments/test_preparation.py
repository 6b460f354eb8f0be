"""The standard configurations follow the model; what the user asked for doesn't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV2Config,
    Glm4MoeConfig,
    HunYuanMoEV1Config,
    JambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from bh_routing.cli.main import main
from bh_routing.errors import InputError
from bh_routing.experiments.configurations import find_baseline, make_rules
from bh_routing.experiments.defaults import ROUTING_CONFIGS, standard_configs
from bh_routing.experiments.preparation import Fitted, fit_to_model, select_configs
from bh_routing.experiments.specs import RunSpec, make_spec
from bh_routing.models.outlook import Outlook, outlook_from_config

BH = ["bh_strict", "bh_moderate", "bh_loose", "bh_adaptive"]
MINE = {"method": "bh", "alpha": 0.2, "max_k": 8}
WARM = {"method": "top_p", "p": 0.9, "temperature": 1.5}
SIGMOID = Outlook("glm4_moe", top_k=4, takes_temperature=False)
SOFTMAX = Outlook("mixtral", top_k=2, takes_temperature=True)


def fit(outlook: Outlook, **values: Any) -> Fitted[RunSpec]:
    return fit_to_model(Fitted(make_spec(RunSpec, **values), {}), outlook)


def test_on_eight_of_a_softmax_the_standard_configurations_stay_as_they_are() -> None:
    fitted = fit(Outlook("olmoe", top_k=8, takes_temperature=True))
    assert fitted.spec.configs == ROUTING_CONFIGS == standard_configs(8)
    assert not fitted.left_out


@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 10])
def test_no_standard_configuration_uses_more_experts_than_the_model(top_k: int) -> None:
    fitted = fit(Outlook("qwen3_moe", top_k=top_k, takes_temperature=True))
    assert list(fitted.spec.configs) == [f"topk_{top_k}", *BH]
    rules = make_rules(fitted.spec.configs)
    assert {named.rule.num_candidates(top_k) for named in rules} == {top_k}
    assert find_baseline(rules, top_k) == f"topk_{top_k}"


def test_what_a_family_cannot_run_is_left_out_with_the_reason() -> None:
    fitted = fit(SIGMOID)
    assert list(fitted.spec.configs) == ["topk_4", *BH[:-1]]
    assert list(fitted.left_out) == ["bh_adaptive"]
    assert "temperature 2 needs" in fitted.left_out["bh_adaptive"]


@pytest.mark.parametrize(
    "values",
    [
        {"only": ["bh_moderate", "bh_adaptive"]},
        {"configs": {**ROUTING_CONFIGS, "warm": WARM}},
        {"configs": {"bh_adaptive": {**ROUTING_CONFIGS["bh_adaptive"], "alpha": 0.02}}},
    ],
)
def test_what_the_user_asked_for_is_an_error_where_it_cannot_run(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"'(bh_adaptive|warm)': temperature \S+ needs"):
        fit(SIGMOID, **values)


def test_a_configuration_that_the_user_changed_or_added_stays_as_it_was_written() -> None:
    changed = {**ROUTING_CONFIGS["bh_strict"], "max_k": 10}
    configs = {**ROUTING_CONFIGS, "bh_strict": changed, "mine": MINE}
    fitted = fit(SOFTMAX, configs=configs).spec.configs
    assert (fitted["bh_strict"], fitted["mine"]) == (changed, MINE)
    assert fitted["bh_loose"]["max_k"] == 2


def test_a_subset_is_chosen_by_the_names_that_the_model_gives() -> None:
    assert list(fit(SOFTMAX, only=["bh_loose", "topk_2"]).spec.configs) == ["topk_2", "bh_loose"]
    with pytest.raises(InputError, match="did you mean 'topk_2'"):
        fit(SOFTMAX, only=["topk_8"])


def test_a_subset_keeps_the_order_of_the_configurations() -> None:
    assert list(select_configs(ROUTING_CONFIGS, ["bh_loose", "topk_8"])) == ["topk_8", "bh_loose"]
    assert select_configs(ROUTING_CONFIGS, None) == ROUTING_CONFIGS
    with pytest.raises(InputError, match="did you mean 'bh_strict'"):
        select_configs(ROUTING_CONFIGS, ["bh_strickt"])


def test_the_users_own_baseline_takes_the_place_of_the_standard_one() -> None:
    configs = {**ROUTING_CONFIGS, "topk_2": {"method": "top_k", "k": 2}}
    assert list(fit(SOFTMAX, configs=configs).spec.configs) == [*BH, "topk_2"]
    with pytest.raises(InputError, match="isn't the model's own top-2"):
        fit(SOFTMAX, configs={**ROUTING_CONFIGS, "topk_2": MINE})


def test_fitting_again_changes_nothing_and_an_unknown_model_waits_for_the_probe() -> None:
    for outlook in (SOFTMAX, SIGMOID):
        once = fit(outlook)
        assert fit_to_model(once, outlook) == once
    assert fit(Outlook("new", None, None)).spec.configs == ROUTING_CONFIGS
    later = fit_to_model(fit(Outlook("new", 4, None)), SIGMOID)
    assert list(later.spec.configs) == ["topk_4", *BH[:-1]]


@pytest.mark.parametrize(
    ("configs", "top_k", "baseline"),
    [
        ({"topk_4": {"method": "topk", "k": 4}, "own": {"method": "topk", "k": 8}}, 8, "own"),
        ({"topk_8": MINE, "half": {"method": "topk", "k": 4}}, 8, "half"),
        ({"topk_8": {"method": "topk", "k": 8}}, 2, "topk_8"),
        ({"topk_8": MINE}, 8, None),
    ],
)
def test_the_rule_decides_what_the_baseline_is_not_the_name(
    configs: dict[str, Any], top_k: int, baseline: str | None
) -> None:
    assert find_baseline(make_rules(configs), top_k) == baseline


@pytest.mark.parametrize(
    ("config", "top_k", "takes_temperature"),
    [
        (MixtralConfig(num_experts_per_tok=3), 3, True),
        (Qwen3MoeConfig(), 8, True),
        (JambaConfig(), 2, True),
        (Glm4MoeConfig(n_group=1), 8, False),
        (DeepseekV2Config(topk_method="greedy", n_group=8, num_experts_per_tok=6), 6, True),
        (DeepseekV2Config(topk_method="group_limited_greedy", n_group=8), None, False),
        (HunYuanMoEV1Config(moe_topk=[2, 2]), 2, True),
        # One k for each layer: the model is rejected once it is loaded.
        (HunYuanMoEV1Config(moe_topk=[2, 4]), None, True),
        (PretrainedConfig(), None, None),
    ],
)
def test_a_configuration_file_says_k_and_temperature(
    config: PretrainedConfig, top_k: int | None, takes_temperature: bool | None
) -> None:
    assert outlook_from_config(config)[1:] == (top_k, takes_temperature)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("run", ["--configs", "bh_adaptive"]),
        ("run", ["--config", "warm.yaml"]),
        ("evaluate", ["--configs", "topk_4,bh_adaptive"]),
        ("evaluate", ["--rule", "top_p:p=0.9,temperature=1.5"]),
        ("lm-eval", ["--configs", "topk_4,bh_adaptive"]),
    ],
)
def test_what_cannot_run_is_rejected_before_any_weight_is_read(
    command: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "lm-eval":
        pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    Path("warm.yaml").write_text("configs: {warm: {method: top_p, p: 0.9, temperature: 1.5}}\n")
    Glm4MoeConfig(num_experts_per_tok=4).save_pretrained("model")  # a config.json alone
    assert main([command, "--model", "./model", *flags, "--output", "results"]) == 2
    assert "needs a router that weighs and selects by the softmax" in capsys.readouterr().err
    assert not Path("results").exists()
