"""Pair the reference scores of a calibration file with the observed scores, for charts.

Axes: N reference scores, M observed scores, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from bh_routing.results.calibration_file import NEEDED, Array, read_calibration

Floats = NDArray[np.float64]

_NORMAL: Final = "gaussian"
_NEEDED: Final[Mapping[str, str]] = {str(definition): null for definition, null in NEEDED.items()}
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
    def fraction_below_05(self) -> float:
        """Fraction of observed scores with p <= 0.05; 0.05 under the null distribution."""
        return float(np.mean(self.p_M <= 0.05))


def read_null_samples(path: str | Path) -> dict[str, tuple[NullSample, ...]]:
    """Read reference and observed scores of every null distribution in a calibration file.

    Args:
        path: the safetensors file that `bh-routing calibrate` wrote.
    Returns:
        Null distribution -> panels; only those with observed scores, which schema 2 lacks.
    Raises:
        CalibrationError: the file is missing or invalid.
    """
    file = read_calibration(Path(path))
    samples = {
        null: tuple(
            _of_layer(null, layer, scores_TE, tables[layer] if tables else None)
            for layer, scores_TE in enumerate(observed)
        )
        for null, observed in file.observed.items()
        if (tables := file.tables.get(null)) or null == _NORMAL
    }
    return samples | _of_slots(file.contributions)


def _of_layer(null: str, layer: int, scores_TE: Array, table: Array | None) -> NullSample:
    label, observed_TE = f"layer {layer}", scores_TE.astype(np.float64)
    if table is None:
        places = (np.arange(NORMAL_QUANTILES) + 0.5) / NORMAL_QUANTILES
        return NullSample(
            label=label,
            reference_N=stats.norm.ppf(places),
            observed_M=observed_TE.ravel(),
            p_M=stats.norm.sf(observed_TE.ravel()),
        )
    reference = table.astype(np.float64)
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


def _of_slots(arrays: Mapping[str, Array]) -> dict[str, tuple[NullSample, ...]]:
    """Pair slots that mattered with all slots, by statistic: the scores that BH-drop compares."""
    found: dict[str, list[NullSample]] = {}
    for name, table_N in sorted(arrays.items()):
        kind, *words = name.split(".")
        if kind != "needed" or (every := arrays.get(f"all.{words[0]}")) is None:
            continue
        needed_N, all_M = table_N.astype(np.float64), every.astype(np.float64)
        sample = NullSample(
            label=words[0],
            reference_N=needed_N,
            observed_M=all_M,
            p_M=upper_tail(-all_M, -needed_N[::-1]),  # here small scores are extreme
        )
        found.setdefault(_NEEDED[words[1]], []).append(sample)
    return {null: tuple(panels) for null, panels in found.items()}


def upper_tail(scores_M: Floats, sorted_N: Floats) -> Floats:
    """Return (1 + #{reference >= s}) / (N + 1)."""
    below_M = np.searchsorted(sorted_N, scores_M, side="left")
    tail: Floats = (1 + sorted_N.size - below_M) / (sorted_N.size + 1)
    return tail
