"""Everything the report is written from, read once and looked up by name.

The summary may come from a user's own `analyze_results`, so nothing in it is taken for granted:
what is missing is NaN, and prints as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bh_routing.records import ExperimentDetail
from bh_routing.report.quality import QualityRow, margin_of, quality_rows
from bh_routing.report.table import Experiments
from bh_routing.report.text import as_float

EXPERTS: Final = "avg_experts_per_token"
SECONDS: Final = "inference_time_sec"
SPEED: Final = "tokens_per_sec"
BALANCE: Final = "expert_utilization_cv"

Details = Mapping[tuple[str, str], ExperimentDetail]
"""(config_name, prompt_text) -> the journal's entry of an experiment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """One run: its experiments, its statistics, and where they come from."""

    table: Experiments
    summary: Mapping[str, Any]
    run: Mapping[str, Any]
    """run.json; empty if there is none."""
    folder: Path
    details: Details = field(default_factory=dict)
    """Empty where only the rows are known."""

    @property
    def names(self) -> list[str]:
        """Configurations with finished experiments."""
        return self.table.names

    @property
    def baseline(self) -> str | None:
        """The configuration that the others are compared with."""
        named = self.summary.get("baseline")
        return str(named) if named in self.table.names else self.table.baseline

    @property
    def others(self) -> list[str]:
        """All configurations but the baseline."""
        return [name for name in self.names if name != self.baseline]

    @property
    def quality(self) -> list[QualityRow]:
        """What the quality phase measured; empty if it wasn't."""
        return quality_rows(self.summary)

    @property
    def margin(self) -> float:
        """ΔNLL that counts as no loss."""
        return margin_of(self.summary)

    @property
    def quality_notes(self) -> list[str]:
        """What the analysis says of the scored text."""
        notes = child(self.summary, "quality").get("notes")
        return list(map(str, notes)) if isinstance(notes, list) else []

    @property
    def model(self) -> Mapping[str, Any]:
        """The model's entry in run.json."""
        return child(self.run, "model")

    @property
    def spec(self) -> Mapping[str, Any]:
        """The resolved spec in run.json."""
        return child(self.run, "spec")

    def describe(self, name: str, metric: str) -> Mapping[str, Any]:
        """{n, mean, sd, low, high, min, max} of a configuration; empty if the summary lacks it."""
        return child(self.summary, "configurations", name, "metrics", metric)

    def compare(self, name: str, metric: str) -> Mapping[str, Any]:
        """The comparison of a configuration with the baseline; empty if the summary lacks it."""
        return child(self.summary, "comparisons", name, metric)

    def compared(self, name: str, metric: str, field: str) -> float:
        """One number of that comparison; NaN if it isn't there."""
        return as_float(self.compare(name, metric).get(field))

    def config(self, name: str) -> Mapping[str, Any]:
        """The configuration's fields in run.json."""
        return child(self.spec, "configs", name)

    def num_prompts(self) -> int:
        """Distinct prompts among the finished experiments."""
        return int(self.table.frame["prompt_text"].nunique())

    def num_experiments(self) -> int:
        """Finished and failed experiments."""
        return len(self.table.frame) + self.table.num_failed


def child(value: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """Follow keys down; an empty mapping where the way ends."""
    for key in path:
        below = value.get(key)
        value = below if isinstance(below, Mapping) else {}
    return value


def known(values: Mapping[str, float]) -> dict[str, float]:
    """Keep the numbers that are there."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
