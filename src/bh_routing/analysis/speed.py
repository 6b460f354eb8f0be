"""Speed-ups from interleaved rounds, and agreement of generated sequences with the baseline's."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd

from bh_routing.results.files import half_read, read_csv
from bh_routing.results.records import TIMING_COLUMNS, ExperimentDetail
from bh_routing.stats.paired import MeanInterval, mean_interval

NUMBERS = tuple(
    name for name in TIMING_COLUMNS if name not in ("key", "config_name", "prompt_text")
)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The baseline's time divided by a configuration's; above 1 the configuration is faster."""

    n: int
    """Number of rounds."""
    mean: float
    """Geometric mean."""
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedUp:
    """Times of one configuration, and their ratios to the baseline's."""

    prefill_ms: float
    """Median over rounds of the time to the first token."""
    decode_ms: float
    """Median over rounds of the time per token after the first; NaN if none was generated."""
    prefill: Ratio
    decode: Ratio
    whole: Ratio
    """For prefill plus as many tokens as the round's longest sequence has."""
    rounds: tuple[float, ...]
    """The configuration's time divided by the baseline's, for each round."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the first token; NaN if they took no time."""
        return 1000 / self.decode_ms if self.decode_ms else math.nan

    @property
    def change(self) -> MeanInterval:
        """Relative change of the whole time: its ratio to the baseline's, minus 1."""
        ends = sorted(1 / end - 1 for end in (self.whole.low, self.whole.high))
        return MeanInterval(self.whole.n, 1 / self.whole.mean - 1, math.nan, *ends)


def read_timings(path: Path, planned: Container[str] | None = None) -> pd.DataFrame:
    """Read `timings.csv`; return an empty table if there is none.

    Args:
        path: the file.
        planned: keys of the experiments whose rows are kept; None: all. Files of an older version
            don't name their experiments and are kept unchanged.
    Raises:
        ResultsError: the file lacks a column, or a time isn't a positive number.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(TIMING_COLUMNS))
    rows = [
        {"key": "", **row}
        for row in read_csv(path, [name for name in TIMING_COLUMNS if name != "key"])
        if planned is None or row.get("key") is None or row["key"] in planned
    ]
    try:
        table = pd.DataFrame(rows, columns=list(TIMING_COLUMNS))
        table = table.astype(dict.fromkeys(NUMBERS, np.float64))
    except ValueError as error:
        raise half_read(path, str(error)) from error
    times = table[["prefill_time_sec", "decode_time_sec"]]
    if not (np.isfinite(times) & (times >= 0)).all(axis=None):
        raise half_read(path, "a time isn't a number of seconds")
    return table


def speed_ups(timings: pd.DataFrame, names: list[str], baseline: str | None) -> dict[str, SpeedUp]:
    """Compare each configuration with the baseline, round by round.

    Args:
        timings: the table from `read_timings`.
        names: configurations, in the order of the result; those without timings are left out.
        baseline: the configuration to compare with.
    Returns:
        Name -> speed-up; 1 for the baseline itself, and empty without its timings.
    """
    steps = timings["num_output_tokens"] - 1
    # A sequence of one token has no time per token after the first.
    timed = timings.assign(token_sec=timings["decode_time_sec"] / steps.where(steps > 0))
    if baseline is None or baseline not in set(timed["config_name"]):
        return {}
    longest = timed.groupby("round")["num_output_tokens"].transform("max")
    decode_sec = (timed["token_sec"] * (longest - 1)).where(longest > 1, 0.0)
    timed["whole_sec"] = timed["prefill_time_sec"] + decode_sec
    parts = {
        part: timed.pivot_table(
            index="round", columns="config_name", values=column, dropna=False
        )
        for part, column in (
            ("prefill", "prefill_time_sec"), ("decode", "token_sec"), ("whole", "whole_sec"),
        )
    }  # fmt: skip
    return {
        name: SpeedUp(
            prefill_ms=1000 * float(parts["prefill"][name].median()),
            decode_ms=1000 * float(parts["decode"][name].median()),
            rounds=tuple((parts["whole"][name] / parts["whole"][baseline]).dropna().tolist()),
            **{part: _ratio(table[baseline], table[name]) for part, table in parts.items()},
        )
        for name in names
        if name in parts["whole"].columns
    }


def _ratio(baseline_R: pd.Series, own_R: pd.Series) -> Ratio:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = mean_interval(np.log((baseline_R / own_R).to_numpy(np.float64)))
    return Ratio(found.n, math.exp(found.mean), math.exp(found.low), math.exp(found.high))


@dataclass(frozen=True, kw_only=True, slots=True)
class TextAgreement:
    """Agreement of one configuration's greedy sequences with the baseline's, over prompts."""

    prompts: int
    """Prompts for which both generated tokens."""
    left_out: int
    """The baseline's other prompts."""
    identical: int
    """Prompts whose sequences agree in every token."""
    prefix_share: MeanInterval
    """Length of the longest common prefix, as a fraction of the longer sequence; the ends of the
    interval are clipped to [0, 1]."""
    agreement_share: MeanInterval
    """Positions with the same token, likewise."""
    prefix_tokens_median: float
    """Median over prompts of the longest common prefix, in tokens."""


def text_agreement(
    details: Mapping[tuple[str, str], ExperimentDetail], baseline: str
) -> dict[str, TextAgreement]:
    """Compare each configuration's token ids with the baseline's on the same prompts.

    Args:
        details: (config_name, prompt_text) -> detail, as in `Results.details`.
        baseline: name of the configuration to compare with.
    Returns:
        Configuration -> agreement, without the baseline, in the order of `details`; NaN if no
        prompt has tokens from both.
    """
    reference = {
        prompt: detail.output_token_ids
        for (name, prompt), detail in details.items()
        if name == baseline
    }
    names = dict.fromkeys(name for name, _ in details if name != baseline)
    return {name: _agreement(name, details, reference) for name in names}


def _agreement(
    name: str,
    details: Mapping[tuple[str, str], ExperimentDetail],
    reference: Mapping[str, Sequence[int]],
) -> TextAgreement:
    prefixes, prefix_shares, agreement_shares, identical = [], [], [], 0
    for prompt, expected in reference.items():
        detail = details.get((name, prompt))
        # A failed experiment has no tokens, which is not disagreement.
        if detail is None or not detail.output_token_ids or not expected:
            continue
        got = detail.output_token_ids
        longer = max(len(got), len(expected))
        same = [a == b for a, b in zip(got, expected, strict=False)]
        prefix = next((i for i, equal in enumerate(same) if not equal), len(same))
        prefixes.append(prefix)
        prefix_shares.append(prefix / longer)
        agreement_shares.append(sum(same) / longer)
        identical += prefix == longer
    return TextAgreement(
        prompts=len(prefixes),
        left_out=len(reference) - len(prefixes),
        identical=identical,
        prefix_share=_fraction_interval(prefix_shares),
        agreement_share=_fraction_interval(agreement_shares),
        prefix_tokens_median=float(median(prefixes)) if prefixes else float("nan"),
    )


def _fraction_interval(shares: Sequence[float]) -> MeanInterval:
    interval = mean_interval(shares)
    if math.isnan(interval.low):
        return interval
    return interval._replace(low=max(0.0, interval.low), high=min(1.0, interval.high))
