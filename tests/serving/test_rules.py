"""vLLM's engine under a rule generates the tokens that transformers generates inside `route`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bh_routing.experiments.prune import prune
from bh_routing.experiments.specs import PruneSpec, make_spec
from bh_routing.models.load import LoadedModel, load_model
from bh_routing.models.routing import route
from bh_routing.nulls.calibration import Calibration
from bh_routing.rules.catalog import make_rule
from tests.serving.conftest import continue_alone, write_yaml
from tests.serving.offline import complete, engine

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(1200)]

RULES: list[dict[str, Any]] = [
    {"method": "top_k", "k": 4},
    {"method": "bh", "alpha": 0.05},
    {"method": "bh_drop", "alpha": 0.3},
]
MORE_RULES: list[dict[str, Any]] = [
    {"method": "bh", "alpha": 0.3, "temperature": 1.5, "weights": "renormalize"},
    {"method": "bh_drop", "alpha": 0.3, "scope": "population", "statistic": "sensitivity"},
    {"method": "top_p", "p": 0.5, "weights": "preserve_mass"},
]


@pytest.mark.parametrize(
    "config",
    [*RULES, *(pytest.param(config, marks=pytest.mark.full) for config in MORE_RULES)],
    ids=lambda config: f"{config['method']}-{len(config)}",
)
def test_served_tokens_are_those_of_route(
    config: dict[str, Any],
    demo: LoadedModel,
    prompts: list[list[int]],
    served_calibration: Calibration,
    calibration_file: Path,
    checkpoint: str,
    tmp_path: Path,
) -> None:
    rule = make_rule(config)
    content = {"rule": config}
    calibration = None
    if rule.required_null is not None:
        content["calibration"], calibration = str(calibration_file), served_calibration  # type: ignore[assignment]
    with engine(write_yaml(tmp_path / "config.yaml", content), checkpoint) as llm:
        served = complete(llm, prompts[:4])
    with route(demo.model, rule, calibration) as trace:
        wanted = [continue_alone(demo.model, ids) for ids in prompts[:4]]
    assert served == wanted
    assert trace.expert_counts.float().mean() < 8


def test_without_a_configuration_the_model_is_untouched(
    demo: LoadedModel, prompts: list[list[int]], checkpoint: str
) -> None:
    with engine(None, checkpoint) as llm:
        served = complete(llm, prompts[:4])
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        methods = [
            vars(module.router)
            for module in runner.get_model().modules()
            if hasattr(module, "router")
        ]
    assert served == [continue_alone(demo.model, ids) for ids in prompts[:4]]
    assert methods
    assert not any("_compute_routing" in own for own in methods)


def test_a_pruned_checkpoint_is_served_like_any_other(
    prompts: list[list[int]], checkpoint: str, tmp_path: Path
) -> None:
    pruned = tmp_path / "pruned"
    prune(make_spec(PruneSpec, model=checkpoint, keep=48, score="random", output=pruned))
    with engine(None, str(pruned)) as llm:
        served = complete(llm, prompts[:4])
    model = load_model(str(pruned), device="cpu", dtype="float32").model
    assert model.config.num_experts == 48
    assert served == [continue_alone(model, ids) for ids in prompts[:4]]


@pytest.mark.full
def test_the_configuration_may_stand_in_vllms_additional_config(
    demo: LoadedModel, prompts: list[list[int]], checkpoint: str
) -> None:
    config = {"bh_routing": {"rule": {"method": "top_k", "k": 2}}}
    with engine(None, checkpoint, additional_config=config) as llm:
        served = complete(llm, prompts[:2])
    with route(demo.model, make_rule({"method": "top_k", "k": 2})):
        assert served == [continue_alone(demo.model, ids) for ids in prompts[:2]]
