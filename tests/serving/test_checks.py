"""A model is checked before it serves: by its weights, and by the router logits of a trial run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
