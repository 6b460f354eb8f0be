"""Read a sweep's folder: which points were run, and the documents scored under each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bh_routing.analysis.bootstrap import Floats
from bh_routing.analysis.quality_records import in_order, read_quality
from bh_routing.analysis.quality_row import STATIC
from bh_routing.errors import ResultsError
from bh_routing.records import QUALITY_JOURNAL, RUN_JSON, SCHEMA_VERSION, QualityRecord
from bh_routing.results.strict_json import half_read, read_json_object

SWEEP: Final = "sweep"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """One rule with its knob set for one budget of experts."""

    config_name: str
    config: Mapping[str, Any]
    """The rule with all its fields."""
    rule: str
    """Name in the catalog of rules."""
    variant: str
    """What tells several forms of one rule apart; empty if there is one."""
    knob: float
    knob_field: str
    budget: float
    calibration_mean_experts: float
    """Mean experts on calibration text at this knob."""
    corrections: float
    """Forward passes that corrected the knob."""
    unreachable: str
    """Why no knob meets the budget; empty if one does."""
    is_curve_only: bool = False
    """Whether nobody asked for the budget: the point only lengthens a reference curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What lies in a sweep's folder."""

    run: Mapping[str, Any]
    """run.json as it is."""
    points: tuple[SweepPoint, ...]
    """Static top-k first, then the rules in the order of run.json."""
    records: tuple[QualityRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredText:
    """Sums over each document. Axes: D documents, C configurations in the order of `names`."""

    names: tuple[str, ...]
    """Configurations scored on exactly these documents."""
    losses_DC: Floats
    """NLL minus that of the model's own top-k, nats."""
    experts_DC: Floats
    """Experts kept, averaged over layers."""
    tokens_D: Floats
    clusters_D: NDArray[np.str_]
    domains_D: NDArray[np.str_]

    def domain(self, name: str) -> ScoredText:
        """The documents of one domain."""
        here = self.domains_D == name
        return ScoredText(
            names=self.names,
            losses_DC=self.losses_DC[here],
            experts_DC=self.experts_DC[here],
            tokens_D=self.tokens_D[here],
            clusters_D=self.clusters_D[here],
            domains_D=self.domains_D[here],
        )


def read_sweep(folder: Path) -> Sweep:
    """Read run.json and the scored documents of a sweep.

    Raises:
        ResultsError: a file is missing, is of another kind or schema, or can't be read whole.
    """
    path = folder / RUN_JSON
    for name in (RUN_JSON, QUALITY_JOURNAL):
        if not (folder / name).is_file():
            raise ResultsError(
                f"{folder} holds no {name}; give the output folder of a finished bh-routing sweep"
            )
    run = read_json_object(path)
    kind, version = run.get("kind"), run.get("schema_version")
    if kind != SWEEP or version != SCHEMA_VERSION:
        raise ResultsError(
            f"{path} is of kind {kind!r} and schema version {version}, expected {SWEEP!r} and "
            f"{SCHEMA_VERSION}; give the output folder of bh-routing sweep"
        )
    try:
        points = (
            *map(_static_point, run["sweep"]["references"]),
            *map(_point, run["sweep"]["points"]),
            *(
                replace(_point(entry), is_curve_only=True)
                for entry in run["sweep"].get("curve_points", ())
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise half_read(path, f"a point of the sweep isn't whole ({error!r})") from error
    configs = {point.config_name: point.config for point in points}
    # An earlier sweep of the same folder may have scored other points, or these at other knobs.
    records = tuple(
        record
        for record in read_quality(folder / QUALITY_JOURNAL)
        if record.config_name in configs and record.rule in ({}, configs[record.config_name])
    )
    return Sweep(run=run, points=points, records=records)


def align(records: Sequence[QualityRecord]) -> ScoredText:
    """Put documents into arrays, for the configurations that scored all of them.

    A configuration that lacks documents, since the sweep was stopped, isn't among the names.

    Raises:
        ResultsError: no token was scored.
    """
    by_name: dict[str, dict[str, QualityRecord]] = defaultdict(dict)
    for record in records:
        if record.tokens > 0:
            by_name[record.config_name][record.document_key] = record
    if not by_name:
        raise ResultsError("no token was scored in this sweep; run bh-routing sweep again")
    fullest = max(by_name.values(), key=len)
    # Sorted: the draws of the bootstrap are by position.
    documents = [r.document_key for r in sorted(fullest.values(), key=in_order)]
    size = {key: record.tokens for key, record in fullest.items()}
    names = tuple(n for n, own in by_name.items() if {d: r.tokens for d, r in own.items()} == size)
    columns = [[by_name[name][key] for name in names] for key in documents]
    return ScoredText(
        names=names,
        losses_DC=np.array([[r.nll_sum - r.top_k_nll_sum for r in row] for row in columns]),
        experts_DC=np.array([[r.experts_sum * r.tokens / r.units for r in row] for row in columns]),
        tokens_D=np.array([fullest[d].tokens for d in documents], dtype=np.float64),
        clusters_D=np.array([fullest[d].cluster for d in documents]),
        domains_D=np.array([fullest[d].domain for d in documents]),
    )


def _static_point(entry: Mapping[str, Any]) -> SweepPoint:
    k = _budget(entry["k"])
    return SweepPoint(
        config_name=str(entry["config_name"]),
        config=dict(entry.get("config") or {"method": STATIC, "k": entry["k"]}),
        rule=STATIC,
        variant="",
        knob=k,
        knob_field="k",
        budget=k,
        calibration_mean_experts=k,
        corrections=0,
        unreachable="",
    )


def _point(entry: Mapping[str, Any]) -> SweepPoint:
    return SweepPoint(
        config_name=str(entry["config_name"]),
        config=dict(entry["config"]),
        rule=str(entry["rule"]),
        variant=str(entry.get("variant") or ""),
        knob=_number(entry.get("knob")),
        knob_field=str(entry.get("knob_field") or ""),
        budget=_budget(entry["budget"]),
        calibration_mean_experts=_number(entry.get("calibration_mean_experts")),
        corrections=_number(entry.get("corrections")),
        unreachable=str(entry.get("unreachable") or ""),
    )


def _budget(value: object) -> float:
    budget = _number(value)
    if not (budget > 0 and math.isfinite(budget)):
        raise ValueError(f"budget {value!r}")
    return budget


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
