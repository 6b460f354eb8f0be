"""What every test may rely on: no network, one thread, and the demo model loaded once."""

from __future__ import annotations

import os

# Before any import of transformers: a test that reaches for the network must fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from typing import Any

import pytest
import torch

from bh_routing.engine.calibrate import calibrate
from bh_routing.engine.texts import packaged_documents
from bh_routing.models.load import LoadedModel, load_model
from bh_routing.nulls.calibration import Calibration


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none, so that `make test-full` runs anywhere."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    """The packaged model on CPU, float32; tests must leave it as they found it."""
    return load_model("demo", device="cpu")


@pytest.fixture(scope="session")
def demo_calibration(demo: LoadedModel) -> Calibration:
    """The demo model calibrated on its packaged text."""
    texts = [document.text for document in packaged_documents("calibration")]
    return calibrate(demo.model, demo.tokenizer, texts, nulls=("background", "pooled"))


@pytest.fixture
def demo_inputs(demo: LoadedModel) -> dict[str, Any]:
    """A short prompt as input ids and attention mask."""
    return dict(demo.tokenizer("The old man walked down to the river and", return_tensors="pt"))
