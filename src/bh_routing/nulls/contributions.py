"""Calibrated contributions of slots, and reference samples of the slots that mattered.

A statistic scores a slot by its routing weight times a scale of the layer and the expert. A
definition determines which calibration slots mattered ("needed" slots). For each pair, the scores
of needed slots, pooled over layers, are the reference sample for "this slot matters".

Axes: L layers, E experts, N reference scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.nulls.base import ReferenceTable
from bh_routing.results.calibration_file import (
    ALL_STEPS,
    NEEDED,
    NEEDED_STEPS,
    OF_SLOTS,
    RESIDUAL_NORMS,
    STEP_SIZES,
    STEPS,
    Array,
    Definition,
    Statistic,
)

__all__ = [
    "ALL_STEPS",
    "BY_LOSS",
    "NEEDED",
    "NEEDED_STEPS",
    "OF_SLOTS",
    "STEPS",
    "STEP_SIZES",
    "Contributions",
    "Definition",
    "Statistic",
    "is_of_null",
    "needed_null",
    "remedy",
]

BY_LOSS: Final[tuple[Statistic, ...]] = ("sensitivity", "layer_sensitivity")
"""Statistics that need gradients."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Contributions:
    """Scales and reference samples of every calibrated statistic."""

    residual_norms_L: Tensor
    """Mean norm of the residual stream after each layer, float32."""
    scales: Mapping[Statistic, Tensor]
    """Statistic -> float32 (L, E): a slot's score is its weight times this."""
    all_scores: Mapping[Statistic, ReferenceTable]
    """Statistic -> a sample of the scores of all slots in all layers."""
    needed_scores: Mapping[tuple[Statistic, Definition], ReferenceTable]
    """Statistic and definition -> a sample of the scores of the slots that mattered."""
    cuts: Mapping[Definition, float] = field(default_factory=dict)
    """Definition -> the contribution above which a slot mattered."""
    steps: Mapping[str, Tensor] = field(default_factory=dict)
    """NEEDED_STEPS and ALL_STEPS -> ascending roots of the Fisher masses of needed and of all pairs
    of expert and decode step, float32, a row per size of STEP_SIZES; empty if not calibrated."""

    def scale(self, statistic: Statistic, layer: int) -> Tensor:
        """Return the scale of each expert in a layer, shape (E,)."""
        if statistic not in self.scales:
            raise _lacks(statistic)
        return self.scales[statistic][layer]

    def all_of(self, statistic: Statistic) -> ReferenceTable:
        """Return the scores of all slots."""
        if statistic not in self.all_scores:
            raise _lacks(statistic)
        return self.all_scores[statistic]

    def needed(self, statistic: Statistic, definition: Definition) -> ReferenceTable:
        """Return the scores of the slots that mattered."""
        if (statistic, definition) not in self.needed_scores:
            raise _lacks(f"{statistic} with needed by {definition}")
        return self.needed_scores[statistic, definition]

    def step_tables(self, name: str) -> Tensor:
        """Return the tables NEEDED_STEPS or ALL_STEPS."""
        if name not in self.steps:
            raise CalibrationError(
                f"calibration holds no table of null {STEPS!r}, which rules on decode steps need; "
                f"{remedy(STEPS)}"
            )
        return self.steps[name]

    def sizes(self, null: str) -> list[int]:
        """Return the table sizes of a null of OF_SLOTS; empty if not calibrated."""
        if null == STEPS:
            return [table_BN.shape[-1] for table_BN in self.steps.values()]
        return [
            len(table)
            for (_, definition), table in self.needed_scores.items()
            if NEEDED[definition] == null
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as tensors by name, for a file or a fingerprint."""
        named = {RESIDUAL_NORMS: self.residual_norms_L}
        named |= {f"scale.{s}": scale_LE for s, scale_LE in self.scales.items()}
        named |= {f"all.{s}": table.sorted_scores_N for s, table in self.all_scores.items()}
        for (statistic, definition), table in self.needed_scores.items():
            named[f"needed.{statistic}.{definition}"] = table.sorted_scores_N
        named |= self.steps
        named |= {f"cut.{definition}": torch.tensor(cut) for definition, cut in self.cuts.items()}
        return named

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> Contributions:
        """Return contributions with the values of `tensors`, read from a file."""
        kinds: dict[str, dict[Any, Any]] = {"scale": {}, "all": {}, "needed": {}, "cut": {}}
        steps = {n: torch.from_numpy(arrays[n]) for n in (NEEDED_STEPS, ALL_STEPS) if n in arrays}
        for name, values in arrays.items():
            if name in steps:
                continue
            kind, *words = name.split(".")
            if words:
                key = words[0] if len(words) == 1 else tuple(words)
                tensor = torch.from_numpy(values)
                kinds[kind][key] = ReferenceTable(tensor) if kind in ("all", "needed") else tensor
        return cls(
            residual_norms_L=torch.from_numpy(arrays[RESIDUAL_NORMS]),
            scales=kinds["scale"],
            all_scores=kinds["all"],
            needed_scores=kinds["needed"],
            cuts={definition: float(cut) for definition, cut in kinds["cut"].items()},
            steps=steps,
        )

    def extended_by(self, other: Contributions) -> Contributions:
        """Return these contributions plus the entries that only `other` has."""
        return Contributions(
            residual_norms_L=self.residual_norms_L,
            scales={**other.scales, **self.scales},
            all_scores={**other.all_scores, **self.all_scores},
            needed_scores={**other.needed_scores, **self.needed_scores},
            cuts={**other.cuts, **self.cuts},
            steps={**other.steps, **self.steps},
        )

    def to(self, device: torch.device) -> Contributions:
        """Return the contributions with their tensors on `device`."""
        return Contributions(
            residual_norms_L=self.residual_norms_L.to(device),
            scales={name: scale_LE.to(device) for name, scale_LE in self.scales.items()},
            all_scores={name: table.to(device) for name, table in self.all_scores.items()},
            needed_scores={name: table.to(device) for name, table in self.needed_scores.items()},
            cuts=self.cuts,
            steps={name: table_BN.to(device) for name, table_BN in self.steps.items()},
        )


def needed_null(statistic: Statistic, definition: Definition) -> str:
    """Return the name of the null to calibrate for a statistic and a definition of needed slots."""
    return NEEDED["loss" if statistic in BY_LOSS else definition]


def is_of_null(name: str, null: str) -> bool:
    """Return whether rules of a null of OF_SLOTS read a tensor of `Contributions.tensors`."""
    if name in (NEEDED_STEPS, ALL_STEPS):
        return null == STEPS
    is_by_loss = any(word in (*BY_LOSS, "loss") for word in name.split("."))
    return null != NEEDED["norm"] or not is_by_loss


def remedy(null: str) -> str:
    """Return the remedy for a calibration without a null of OF_SLOTS."""
    nulls = ["background", null]
    calibrate = f"run: bh_routing.calibrate(model, tokenizer, texts, nulls={nulls})"
    if null == NEEDED["loss"]:
        return f"{calibrate}, or use statistic: contribution, which needs no gradients"
    return calibrate


def _lacks(what: str) -> CalibrationError:
    return CalibrationError(
        f"calibration holds no statistic {what}; calibrate with nulls 'needed' for contribution "
        "and weight, and 'needed_by_loss' for sensitivities and loss"
    )
