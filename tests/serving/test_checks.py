"""A model is checked before it serves: by its weights, and by the router logits of a trial run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig, LlamaConfig, PretrainedConfig

from tests.serving.checkpoints import SENTENCES, Change, blow_up, changed_checkpoint, damage, turn
from tests.serving.conftest import write_yaml
from tests.serving.offline import complete, engine

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(1200)]


@pytest.mark.parametrize("change", [turn, damage, blow_up])
def test_a_model_that_cannot_be_served_ends_the_start_with_one_sentence(
    change: Change, checkpoint: str, calibration_file: Path, tmp_path: Path
) -> None:
    content = {"rule": {"method": "bh", "alpha": 0.05}, "calibration": str(calibration_file)}
    config = write_yaml(tmp_path / "config.yaml", content)
    model = changed_checkpoint(tmp_path / "model", checkpoint, change)
    with pytest.raises(SystemExit) as caught, engine(config, model):
        pass
    assert str(caught.value).startswith("bh-routing: ")
    assert SENTENCES[change.__name__] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"enable_expert_parallel": True}, "leave out --enable-expert-parallel"),
        ({"enable_lora": True}, "--enable-lora was not tried with a rule; leave it out"),
    ],
    ids=["expert parallelism", "LoRA"],
)
def test_an_untried_setting_ends_the_start_with_the_option_to_leave_out(
    options: dict[str, Any], sentence: str, checkpoint: str, tmp_path: Path
) -> None:
    config = write_yaml(tmp_path / "config.yaml", {"rule": {"method": "top_k", "k": 4}})
    with pytest.raises(SystemExit, match=sentence), engine(config, checkpoint, **options):
        pass


SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096, "pad_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (LlamaConfig(**SIZES), "LlamaForCausalLM has no mixture-of-experts layer with a router"),
        (
            Glm4MoeConfig(**SIZES, n_routed_experts=8, num_experts_per_tok=2,
                          moe_intermediate_size=32, first_k_dense_replace=1),
            r"model.layers.1.*: its router .*, and rules apply to the k largest of a softmax",
        ),
    ],
    ids=["dense", "grouped"],
)  # fmt: skip
def test_a_model_without_plain_routers_is_to_be_served_without_a_rule(
    config: PretrainedConfig, sentence: str, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    rule = write_yaml(tmp_path / "config.yaml", {"rule": {"method": "top_k", "k": 2}})
    served = engine(rule, str(tmp_path / "model"), skip_tokenizer_init=True)
    with pytest.raises(SystemExit, match=sentence) as caught, served:
        pass
    assert str(caught.value).endswith("serve the model without a rule: unset BH_ROUTING_CONFIG")


@pytest.fixture
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_uninitialised_memory_is_nan")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.full)])
def test_the_trial_run_reads_no_uninitialised_memory(
    dtype: str, prompts: list[list[int]], checkpoint: str, tmp_path: Path
) -> None:
    config = write_yaml(tmp_path / "config.yaml", {"rule": {"method": "top_k", "k": 4}})
    with engine(config, checkpoint, dtype=dtype) as llm:
        assert [len(tokens) for tokens in complete(llm, prompts[:2], 5)] == [5, 5]
