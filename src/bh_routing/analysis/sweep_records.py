"""Points and scored documents of a sweep's folder, and the rows of its tables."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from bh_routing.analysis.quality_row import STATIC, in_order, read_quality
from bh_routing.errors import ResultsError
from bh_routing.results.files import half_read, read_json_object
from bh_routing.results.records import (
    JOURNAL,
    QUALITY_JOURNAL,
    RESULTS_CSV,
    RUN_JSON,
    SCHEMA_VERSION,
    QualityRecord,
    column,
    measured,
)
from bh_routing.stats.bootstrap import Floats

SWEEP: Final = "sweep"
ALL_DOMAINS: Final = "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class PointRow:
    """One row of `points.csv`: a rule with its tuning parameter set for one budget.

    `points_by_domain.csv` has the same columns for the documents of one domain. Losses are in nats
    per token relative to the model's own top-k. NaN means unknown, and `note` gives the reason;
    before the comparison it is the reason why no value of the parameter meets the budget.
    """

    rule: str = column("Name in the catalog of rules; top_k is static top-k.")
    variant: str = column("Distinguishes several forms of one rule.")
    knob: float = column("Value of the tuning parameter, found on calibration text.")
    budget: float = column(
        "Cost that the tuning parameter was set for: mean experts per token, or in decode steps a "
        "fraction of the distinct experts that the model's own top-k reads."
    )
    domain: str = column("Domain of the text, or all.", default=ALL_DOMAINS)
    mean_experts: float = measured("Mean experts kept per token on the evaluation text.")
    delta_nll: float = measured("Loss: NLL minus that of the model's own top-k.")
    delta_nll_low: float = measured("Lower end of its 95 % interval, for this row alone.")
    delta_nll_high: float = measured("Upper end of that interval.")
    perplexity_ratio: float = measured("exp(delta_nll): 1.01 is one per cent more perplexity.")
    kl_mean: float = measured("KL(top-k || rule) over the full vocabulary, nats per token.")
    same_top1_share: float = measured("Fraction of tokens where both rank the same token first.")
    mean_distinct_experts: float = measured(
        "Mean distinct experts per decode step and layer, over its tokens; NaN without decode "
        "steps. With them it is the cost that is equal."
    )
    rank: int | None = column(
        "Rank in its budget by the fraction of static top-k's increase in perplexity that it saves "
        "at its own mean; static top-k, oracles and controls have none.",
        default=None,
    )
    config_name: str = column("Name of the point in quality.jsonl.")
    knob_field: str = column("Name of the tuning parameter.")
    calibration_mean_experts: float = column("Mean experts on calibration text.")
    corrections: float = column("Forward passes on calibration text that corrected the parameter.")
    off_budget: bool = column("The cost is more than 2 % away from the budget.", default=False)
    is_curve_only: bool = column("The point only lengthens a reference curve.", default=False)
    tokens: int = column("Scored tokens.", default=0)
    documents: int = column("Documents with a scored token.", default=0)
    clusters: int = column(
        "Independent clusters of documents: the chapters of a book are one.", default=0
    )
    method: str = column("Source of the interval of delta_nll.", default="")
    note: str = column("The missing values and the reason; empty if none is missing.")

    @property
    def cost(self) -> float:
        """The cost that is equal: distinct experts per decode step, else experts per token."""
        is_known = math.isfinite(self.mean_distinct_experts)
        return self.mean_distinct_experts if is_known else self.mean_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Contents of a sweep's folder."""

    run: Mapping[str, Any]
    """Content of run.json."""
    points: tuple[PointRow, ...]
    """Static top-k first, then the rules in the order of run.json; not yet compared."""
    configs: Mapping[str, Mapping[str, Any]]
    """Point -> all fields of its rule."""
    records: tuple[QualityRecord, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredText:
    """Sums over each document. Axes: D documents, C configurations in the order of `names`."""

    names: tuple[str, ...]
    """Configurations scored on all these documents."""
    losses_DC: Floats
    """NLL minus that of the model's own top-k, in nats."""
    cost_DC: Floats
    """Kept experts, or in decode steps the distinct experts of the token's step, averaged over
    layers: a point costs their sum divided by that of tokens."""
    has_steps: bool = False
    """Whether the tokens were scored in decode steps."""
    tokens_D: Floats
    clusters_D: NDArray[np.str_]
    draws_D: NDArray[np.int64]
    """Draw of step companions."""
    domains_D: NDArray[np.str_]

    def domain(self, name: str) -> ScoredText:
        """Return the sums of one domain's documents."""
        here = self.domains_D == name
        return ScoredText(
            names=self.names,
            losses_DC=self.losses_DC[here],
            cost_DC=self.cost_DC[here],
            has_steps=self.has_steps,
            tokens_D=self.tokens_D[here],
            clusters_D=self.clusters_D[here],
            draws_D=self.draws_D[here],
            domains_D=self.domains_D[here],
        )


def is_sweep(folder: Path) -> bool:
    """Return whether a folder has run.json, but no results of a run."""
    is_run = any((folder / name).is_file() for name in (RESULTS_CSV, JOURNAL))
    return (folder / RUN_JSON).is_file() and not is_run


def read_sweep(folder: Path) -> Sweep:
    """Read run.json and the scored documents of a sweep.

    Raises:
        ResultsError: a file is missing, damaged, or of another kind or schema.
    """
    path = folder / RUN_JSON
    for name in (RUN_JSON, QUALITY_JOURNAL):
        if not (folder / name).is_file():
            raise ResultsError(
                f"{folder} holds no {name}; name a folder that a finished sweep or run wrote"
            )
    run = read_json_object(path)
    kind, version = run.get("kind"), run.get("schema_version")
    if kind != SWEEP or version != SCHEMA_VERSION:
        raise ResultsError(
            f"{path} has kind {kind!r} and schema version {version}, expected {SWEEP!r} and "
            f"{SCHEMA_VERSION}; name a folder that a sweep or run wrote"
        )
    try:
        return make_sweep(run, read_quality(folder / QUALITY_JOURNAL))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ResultsError):
            raise
        raise half_read(path, f"a point of the sweep isn't whole ({error!r})") from error


def make_sweep(run: Mapping[str, Any], records: Iterable[QualityRecord]) -> Sweep:
    """Build a sweep from the content of run.json and the scored documents.

    Raises:
        KeyError, TypeError, ValueError: a point isn't whole.
    """
    block = run[SWEEP]
    entries = [*map(_static, block["references"]), *block["points"]]
    further = block.get("curve_points", ())
    points = (*map(_point, entries), *(replace(_point(e), is_curve_only=True) for e in further))
    configs = {str(e["config_name"]): dict(e["config"]) for e in (*entries, *further)}
    # An earlier sweep of this folder may have scored other points, or these at other values.
    kept = tuple(
        record
        for record in records
        if record.config_name in configs and record.rule in ({}, configs[record.config_name])
    )
    return Sweep(run=run, points=points, configs=configs, records=kept)


def align(records: Sequence[QualityRecord]) -> ScoredText:
    """Arrange documents in arrays, for the configurations that scored all of them.

    A configuration that lacks documents, because the sweep was stopped, is left out.

    Raises:
        ResultsError: no token was scored.
    """
    by_name: dict[str, dict[str, QualityRecord]] = defaultdict(dict)
    for record in records:
        if record.tokens > 0:
            by_name[record.config_name][record.document_key] = record
    if not by_name:
        raise ResultsError("no token was scored in this sweep; resume it")
    fullest = max(by_name.values(), key=len)
    # Sorted, since the bootstrap draws by position.
    documents = [r.document_key for r in sorted(fullest.values(), key=in_order)]
    size = {key: record.tokens for key, record in fullest.items()}
    names = tuple(n for n, own in by_name.items() if {d: r.tokens for d, r in own.items()} == size)
    columns = [[by_name[name][key] for name in names] for key in documents]
    has_steps = all(r.distinct_experts_sum is not None for row in columns for r in row)
    return ScoredText(
        names=names,
        losses_DC=np.array([[r.nll_sum - r.top_k_nll_sum for r in row] for row in columns]),
        cost_DC=np.array([[_cost(r, has_steps) for r in row] for row in columns]),
        has_steps=has_steps,
        tokens_D=np.array([fullest[d].tokens for d in documents], dtype=np.float64),
        clusters_D=np.array([fullest[d].cluster for d in documents]),
        draws_D=np.array([fullest[d].draw for d in documents]),
        domains_D=np.array([fullest[d].domain for d in documents]),
    )


def _cost(record: QualityRecord, has_steps: bool) -> float:
    """Return a record's cost, averaged over layers."""
    total = record.distinct_experts_sum if has_steps else record.experts_sum
    return (total or 0) * record.tokens / record.units


def _static(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a static top-k's entry in the form of the others."""
    k = entry["k"]
    config = entry.get("config") or {"method": STATIC, "k": k}
    own = {"config": config, "budget": entry.get("budget", k), "rule": STATIC, "knob": k}
    return {
        **own, "config_name": entry["config_name"], "knob_field": "k",
        "calibration_mean_experts": k, "corrections": 0,
    }  # fmt: skip


def _point(entry: Mapping[str, Any]) -> PointRow:
    return PointRow(
        config_name=str(entry["config_name"]),
        rule=str(entry["rule"]),
        variant=str(entry.get("variant") or ""),
        knob=_number(entry.get("knob")),
        knob_field=str(entry.get("knob_field") or ""),
        budget=_budget(entry["budget"]),
        calibration_mean_experts=_number(entry.get("calibration_mean_experts")),
        corrections=_number(entry.get("corrections")),
        note=str(entry.get("unreachable") or ""),
    )


def _budget(value: object) -> float:
    budget = _number(value)
    if not (budget > 0 and math.isfinite(budget)):
        raise ValueError(f"budget {value!r}")
    return budget


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
