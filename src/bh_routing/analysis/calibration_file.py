"""Read the reference scores and the observed scores of a calibration file, without torch.

Axes: N reference scores, M observed scores, T tokens, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from scipy import stats

from bh_routing.errors import CalibrationError

Floats = NDArray[np.float64]

_FORMAT: Final = "bh_routing.calibration"
_SCHEMAS: Final = ("2", "3", "4")
_NORMAL: Final = "gaussian"
_NEEDED: Final = {"norm": "needed", "loss": "needed_by_loss"}
_REMEDY: Final = "run: bh-routing calibrate --model NAME --output FILE"
NORMAL_QUANTILES: Final = 20_000
"""Number of quantiles that represent N(0, 1), which has no table."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NullSample:
    """Reference and observed scores of one panel: of a layer or, for slots, of all layers."""

    label: str
    """Layer, or statistic of the slots."""
    reference_N: Floats
    """Ascending; for a per-expert null distribution, the tables of all experts pooled."""
    observed_M: Floats
    p_M: Floats
    """p-value of each observed score, from its own expert's table if there is one."""

    @property
    def share_below_05(self) -> float:
        """Fraction of observed scores with p <= 0.05; 0.05 under the null distribution."""
        return float(np.mean(self.p_M <= 0.05))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibrationSamples:
    """The contents of a calibration file that charts need."""

    facts: Mapping[str, Any]
    """Provenance, from the file's header."""
    samples: Mapping[str, tuple[NullSample, ...]]
    """Null distribution -> panels, without those that have no observed scores (schema 2)."""


def read_calibration_samples(path: str | Path) -> CalibrationSamples:
    """Read reference and observed scores of every null distribution in a calibration file.

    Args:
        path: the safetensors file that `bh-routing calibrate` wrote, of schema 2 to 4.
    Raises:
        CalibrationError: the file is missing, or isn't a calibration file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header: dict[str, str] = file.metadata() or {}
            names = set(file.keys()) - {"passages"}
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} is no calibration ({error}); {_REMEDY}") from error
    if header.get("format") != _FORMAT or header.get("schema") not in _SCHEMAS:
        raise CalibrationError(
            f"{path} has format {header.get('format')!r} and schema {header.get('schema')!r}, "
            f"pictures are made of {_FORMAT!r} and schema {' or '.join(_SCHEMAS)}; {_REMEDY}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
            raise CalibrationError(
                f"{name!r} of calibration {path} must hold finite floats, got {tensor.dtype}; "
                f"{_REMEDY}"
            )
    try:
        facts = json.loads(header["facts"])
        layers = range(int(facts["num_layers"]))
        samples = {
            null: tuple(_of_layer(tensors, null, layer) for layer in layers)
            for null in facts.get("observed", [])
        }
        samples |= _of_slots(tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"calibration {path} lacks {error}; {_REMEDY}") from error
    return CalibrationSamples(facts=facts, samples=samples)


def _of_layer(tensors: Mapping[str, Any], null: str, layer: int) -> NullSample:
    label, observed_TE = f"layer {layer}", tensors[f"observed.{null}.{layer}"].astype(np.float64)
    if null == _NORMAL:
        places = (np.arange(NORMAL_QUANTILES) + 0.5) / NORMAL_QUANTILES
        return NullSample(
            label=label,
            reference_N=stats.norm.ppf(places),
            observed_M=observed_TE.ravel(),
            p_M=stats.norm.sf(observed_TE.ravel()),
        )
    reference = tensors[f"{null}.{layer}"].astype(np.float64)
    if reference.ndim == 1:
        p_M = upper_tail(observed_TE.ravel(), reference)
    else:
        by_expert = zip(observed_TE.T, reference, strict=True)
        p_M = np.stack([upper_tail(scores, table) for scores, table in by_expert], axis=-1).ravel()
    return NullSample(
        label=label,
        reference_N=np.sort(reference, axis=None),
        observed_M=observed_TE.ravel(),
        p_M=p_M,
    )


def _of_slots(tensors: Mapping[str, Any]) -> dict[str, tuple[NullSample, ...]]:
    """Pair slots that mattered with all slots, by statistic: the scores that BH-drop compares."""
    found: dict[str, list[NullSample]] = {}
    for name in sorted(tensors):
        if not name.startswith("contributions.needed."):
            continue
        statistic, definition = name.split(".")[2:]
        needed_N = tensors[name].astype(np.float64)
        all_M = tensors[f"contributions.all.{statistic}"].astype(np.float64)
        sample = NullSample(
            label=statistic,
            reference_N=needed_N,
            observed_M=all_M,
            p_M=upper_tail(-all_M, -needed_N[::-1]),  # here small scores are extreme
        )
        found.setdefault(_NEEDED[definition], []).append(sample)
    return {null: tuple(panels) for null, panels in found.items()}


def upper_tail(scores_M: Floats, sorted_N: Floats) -> Floats:
    """Return (1 + #{reference >= s}) / (N + 1)."""
    below_M = np.searchsorted(sorted_N, scores_M, side="left")
    tail: Floats = (1 + sorted_N.size - below_M) / (sorted_N.size + 1)
    return tail
