"""What pictures read of a calibration file is what the running tower computes itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bh_routing.analysis.calibration_file import CalibrationSamples, read_calibration_samples
from bh_routing.errors import CalibrationError
from bh_routing.nulls import NULLS, Calibration, ReferenceTable, RouterPass
from bh_routing.nulls.contributions import NEEDED
from bh_routing.rules.drop import lower_tail
from tests.nulls.test_calibration import make
from tests.rules.proposals import made_up_contributions, random_logits

LOGITS_TE = random_logits(40, seed=3)
FITTED = [null for null in NULLS.values() if null.needs_table and not null.needs_gate]


def table_of(name: str) -> ReferenceTable:
    logits_TE = random_logits(500, seed=4)
    return NULLS[name].table_of(RouterPass(logits_TE, logits_TE.topk(8).indices))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    observed: dict[str, tuple[Tensor, ...]] = {
        name: tuple(NULLS[name].score(LOGITS_TE) for _ in range(3))
        for name in ("gaussian", *(null.name for null in FITTED))
    }
    calibration = make(
        tables={null.name: tuple(table_of(null.name) for _ in range(3)) for null in FITTED},
        observed=observed,
        num_layers=3,
        num_experts=64,
        contributions=made_up_contributions(64, 8),
    )
    return calibration.save(tmp_path_factory.mktemp("calibration") / "c.safetensors")


@pytest.fixture(scope="module")
def read(path: Path) -> CalibrationSamples:
    return read_calibration_samples(path)


@pytest.mark.parametrize("name", ["gaussian", *(null.name for null in FITTED)])
def test_p_values_are_those_of_the_null(read: CalibrationSamples, name: str) -> None:
    table = table_of(name) if NULLS[name].needs_table else None
    expected = NULLS[name].p_from_score(NULLS[name].score(LOGITS_TE), table).flatten().numpy()
    panels = read.samples[name]
    assert [panel.label for panel in panels] == ["layer 0", "layer 1", "layer 2"]
    for panel in panels:
        assert np.allclose(panel.p_M, expected, rtol=1e-12, atol=0)
        assert panel.share_below_05 == np.mean(expected <= 0.05)
        assert (np.diff(panel.reference_N) >= 0).all()


def test_slots_are_compared_as_bh_drop_does(path: Path, read: CalibrationSamples) -> None:
    contributions = Calibration.load(path).contributions
    assert contributions is not None
    for definition, null in NEEDED.items():
        for panel in read.samples[null]:
            statistic = panel.label
            needed = contributions.needed(statistic, definition)  # type: ignore[arg-type]
            scores = contributions.all_of(statistic).sorted_scores_N  # type: ignore[arg-type]
            assert panel.p_M.tolist() == lower_tail(scores, needed).tolist()


def test_what_is_no_calibration_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign", metadata={"format": "pt"})
    header = {"format": "bh_routing.calibration", "schema": "4"}
    facts = json.dumps({"num_layers": 1, "observed": ["pooled"]})
    save_file({"a": torch.zeros(1)}, tmp_path / "lacking", metadata=header | {"facts": facts})
    for name, message in (
        ("nowhere", "is no calibration"),
        ("text", "is no calibration"),
        ("foreign", "has format 'pt' and schema None"),
        ("lacking", "lacks 'observed.pooled.0'"),
    ):
        with pytest.raises(CalibrationError, match=message) as caught:
            read_calibration_samples(tmp_path / name)
        assert "\n" not in str(caught.value)
