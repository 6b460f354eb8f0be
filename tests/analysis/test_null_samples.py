"""The scores and p-values that charts read of a calibration file are those of the rules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.nulls import NULLS, Calibration, ReferenceTable, RouterPass
from bh_routing.nulls.contributions import NEEDED
from bh_routing.report.charts.calibration import NullSample, read_null_samples
from bh_routing.results.calibration_file import BY_EXPERT
from bh_routing.rules.drop import lower_tail
from tests.nulls.test_calibration import make, rewrite
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
def read(path: Path) -> dict[str, tuple[NullSample, ...]]:
    return read_null_samples(path)


@pytest.mark.parametrize("name", ["gaussian", *(null.name for null in FITTED)])
def test_p_values_are_those_of_the_null(read: dict[str, tuple[NullSample, ...]], name: str) -> None:
    table = table_of(name) if NULLS[name].needs_table else None
    expected = NULLS[name].p_from_score(NULLS[name].score(LOGITS_TE), table).flatten().numpy()
    panels = read[name]
    assert [panel.label for panel in panels] == ["layer 0", "layer 1", "layer 2"]
    for panel in panels:
        assert np.allclose(panel.p_M, expected, rtol=1e-12, atol=0)
        assert panel.fraction_below_05 == np.mean(expected <= 0.05)
        assert (np.diff(panel.reference_N) >= 0).all()


def test_slots_are_compared_as_bh_drop_does(
    path: Path, read: dict[str, tuple[NullSample, ...]]
) -> None:
    contributions = Calibration.load(path).contributions
    assert contributions is not None
    for definition, null in NEEDED.items():
        for panel in read[null]:
            statistic = panel.label
            needed = contributions.needed(statistic, definition)  # type: ignore[arg-type]
            scores = contributions.all_of(statistic).sorted_scores_N  # type: ignore[arg-type]
            assert panel.p_M.tolist() == lower_tail(scores, needed).tolist()


def test_a_null_has_a_row_per_expert_in_its_file_if_its_tables_do() -> None:
    assert {name for name, null in NULLS.items() if null.by_expert} == set(BY_EXPERT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_a_dtype_that_no_calibration_has_is_rejected(path: Path, dtype: torch.dtype) -> None:
    """numpy has no bfloat16 and no float8: reading one must not fail in numpy."""

    def change(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        tensors["pooled.0"] = tensors["pooled.0"].to(dtype)

    other = path.with_name(f"{dtype}.safetensors")
    other.write_bytes(path.read_bytes())
    rewrite(other, change)
    for read_file in (read_null_samples, Calibration.load):
        with pytest.raises(CalibrationError, match=r"'pooled.0' .* must be float32, got \w+\d"):
            read_file(other)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("contributions.residual_norms", None, "lacks the table"),
        ("contributions.scale.weight", torch.zeros(2, 2), r"of shape \(3, 64\)"),
        ("contributions.scale.weight", -torch.ones(3, 64), "at least 0"),
        ("contributions.needed.weight.norm", torch.ones(2, 2), r"of shape \(N,\)"),
        ("contributions.all.weight", torch.tensor([2.0, 1.0]), "must be sorted"),
    ],
)
def test_charts_and_rules_reject_the_same_files(
    path: Path, tmp_path: Path, name: str, values: Tensor | None, message: str
) -> None:
    def change(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        assert tensors.pop(name).numel()
        tensors |= {} if values is None else {name: values}

    other = tmp_path / "changed.safetensors"
    other.write_bytes(path.read_bytes())
    rewrite(other, change)
    for read_file in (read_null_samples, Calibration.load):
        with pytest.raises(CalibrationError, match=message):
            read_file(other)
