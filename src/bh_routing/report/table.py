"""Finished experiments, prepared for charts and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bh_routing.analysis.comparisons import choose_baseline
from bh_routing.analysis.speed import SpeedUp, speed_ups
from bh_routing.errors import InputError
from bh_routing.results.records import STATUS_OK

NEEDED: Final = ("config_name", "prompt_text")
MEASURES: Final = (
    "avg_experts_per_token",
    "std_experts_per_token",
    "min_experts",
    "max_experts",
    "inference_time_sec",
    "decode_time_sec",
    "num_output_tokens",
    "tokens_per_sec",
    "expert_utilization_cv",
    "expert_utilization_cv_noise",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiments:
    """Finished experiments with numeric columns, in the order of the results."""

    frame: pd.DataFrame
    names: list[str]
    """Configurations with at least one finished experiment."""
    baseline: str | None
    failures: list[tuple[str, str, str]]
    """Configuration, prompt and reason of each failed experiment."""
    speed_ups: Mapping[str, SpeedUp] = field(default_factory=dict)
    """Speed-ups from interleaved rounds; empty if there were none."""

    @property
    def others(self) -> list[str]:
        """Configurations other than the baseline."""
        return [name for name in self.names if name != self.baseline]

    @property
    def categories(self) -> list[str]:
        """Prompt categories in the order of the results."""
        return [str(category) for category in self.frame["prompt_category"].drop_duplicates()]

    def values(self, name: str, column: str) -> NDArray[np.float64]:
        """Return the finite values of one configuration."""
        mine = self.frame.loc[self.frame["config_name"] == name, column]
        return mine.dropna().to_numpy(dtype=np.float64)

    def mean(self, name: str, column: str) -> float:
        """Return the mean of one configuration; NaN without values."""
        values_n = self.values(name, column)
        return float(values_n.mean()) if len(values_n) else float("nan")

    def paired(self, name: str, column: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the values of a configuration and the baseline on prompts that both finished."""
        pairs = pd.concat(
            [self._by_prompt(name, column), self._by_prompt(self.baseline or "", column)],
            axis=1,
            join="inner",
            keys=["own", "baseline"],
        ).dropna()
        return pairs["own"].to_numpy(np.float64), pairs["baseline"].to_numpy(np.float64)

    def _by_prompt(self, name: str, column: str) -> pd.Series:
        mine = self.frame[self.frame["config_name"] == name]
        return mine.groupby("prompt_text", sort=False)[column].mean()


def experiments_of(results: pd.DataFrame, timings: pd.DataFrame | None = None) -> Experiments:
    """Select the finished rows of a results table; missing columns become NaN.

    Args:
        results: rows as in `bh_routing_results.csv`.
        timings: interleaved rounds, as in `Results.timings`; None: none.
    Raises:
        InputError: config_name, prompt_text or avg_experts_per_token is missing.
    """
    missing = [c for c in (*NEEDED, "avg_experts_per_token") if c not in results.columns]
    if missing:
        raise InputError(
            f"the results lack the column {', '.join(missing)}; "
            "read them with load_results or from bh_routing_results.csv"
        )
    rows = results.copy()
    rows["config_name"] = rows["config_name"].astype(str)
    rows["prompt_text"] = rows["prompt_text"].astype(str)
    category = rows["prompt_category"] if "prompt_category" in rows.columns else ""
    rows["prompt_category"] = pd.Series(category, index=rows.index).fillna("").astype(str)
    for column in MEASURES:
        known = rows[column] if column in rows.columns else np.nan
        numbers = pd.to_numeric(pd.Series(known, index=rows.index), errors="coerce")
        rows[column] = numbers.astype(np.float64).replace([np.inf, -np.inf], np.nan)
    is_ok = rows["status"] == STATUS_OK if "status" in rows.columns else rows["config_name"] != ""
    noise = rows["expert_utilization_cv_noise"]
    rows["load_over_noise"] = rows["expert_utilization_cv"] / noise.where(noise > 0)
    frame = rows[is_ok].reset_index(drop=True)
    names = [str(name) for name in frame["config_name"].drop_duplicates()]
    baseline = choose_baseline(frame)
    timed = {} if timings is None else speed_ups(timings, names, baseline)
    failed = rows[~is_ok]
    reasons = failed["error"] if "error" in rows.columns else [""] * len(failed)
    texts = (map(str, column) for column in (failed["config_name"], failed["prompt_text"], reasons))
    return Experiments(
        frame=frame,
        names=names,
        baseline=baseline,
        failures=list(zip(*texts, strict=True)),
        speed_ups=timed,
    )
