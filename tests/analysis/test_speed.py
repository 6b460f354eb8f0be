"""Speed-ups are ratios within rounds; what the machine did between rounds cancels."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bh_routing.analysis.speed import read_timings, speed_ups
from bh_routing.errors import ResultsError

ROUNDS = 8


def timings(factor: float, noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Rounds on a machine whose speed drifts fivefold; `fast` takes 1 / factor of the time."""
    generator = np.random.default_rng(seed)
    rows = []
    for round_ in range(1, ROUNDS + 1):
        for name, share in (("topk_8", 1.0), ("fast", 1 / factor)):
            seconds = 0.5 * round_ * share * math.exp(noise * generator.standard_normal())
            rows.append((round_, name, f"prompt {round_}", 5, 11, seconds / 5, seconds))
    columns = ["round", "config_name", "prompt_text", "num_input_tokens", "num_output_tokens",
               "prefill_time_sec", "decode_time_sec"]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def test_a_drifting_machine_cancels_within_rounds() -> None:
    found = speed_ups(timings(1.25, noise=0.01), ["topk_8", "fast"], "topk_8")["fast"]
    for ratio in (found.prefill, found.decode, found.whole):
        assert ratio.n == ROUNDS
        assert ratio.low < 1.25 < ratio.high
        assert ratio.high - ratio.low < 0.05
    assert found.change.low < 1 / 1.25 - 1 < found.change.high
    assert found.decode_ms == pytest.approx(1000 * 0.5 * 4.5 / 1.25 / 10, rel=0.02)


def test_intervals_hold_the_true_ratio_as_often_as_they_say() -> None:
    tries = 150
    hits = 0
    for seed in range(tries):
        ratio = speed_ups(timings(1.1, 0.1, seed), ["fast"], "topk_8")["fast"].decode
        hits += ratio.low <= 1.1 <= ratio.high
    assert hits / tries == pytest.approx(0.95, abs=0.054)  # three standard errors


def test_texts_that_end_early_count_by_the_token() -> None:
    table = timings(1.0)
    is_fast = table["config_name"] == "fast"
    table.loc[is_fast, "num_output_tokens"] = 6
    table.loc[is_fast, "decode_time_sec"] /= 2
    ratio = speed_ups(table, ["fast"], "topk_8")["fast"].whole
    assert ratio.mean == pytest.approx(1.0)
    assert math.isnan(ratio.low)  # all rounds alike: no spread to make an interval of


def test_without_the_baseline_there_is_nothing_to_compare() -> None:
    assert speed_ups(timings(2.0), ["fast"], None) == {}
    assert speed_ups(timings(2.0), ["fast"], "topk_4") == {}
    assert list(speed_ups(timings(2.0), ["fast", "absent"], "topk_8")) == ["fast"]


def test_rounds_are_read_back_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "timings.csv"
    assert read_timings(path).empty
    timings(2.0).to_csv(path, index=False)
    assert speed_ups(read_timings(path), ["fast"], "topk_8")["fast"].decode.mean == pytest.approx(2)
    text = path.read_text()
    for damage in (text.replace("0.5", "-0.5", 1), text.replace("round,", "", 1), "no table"):
        path.write_text(damage)
        with pytest.raises(ResultsError, match=r"timings\.csv"):
            read_timings(path)


def test_a_ratio_of_one_round_has_no_interval() -> None:
    table = timings(2.0)
    ratio = speed_ups(table[table["round"] == 1], ["fast"], "topk_8")["fast"].whole
    assert ratio.n == 1
    assert ratio.mean == pytest.approx(2.0)
    assert math.isnan(ratio.low) and math.isnan(ratio.high)


def test_texts_of_one_token_have_no_time_per_token_but_a_whole_time() -> None:
    table = timings(2.0).assign(num_output_tokens=1, decode_time_sec=0.0)
    found = speed_ups(table, ["topk_8", "fast"], "topk_8")["fast"]
    assert math.isnan(found.decode_ms)
    assert math.isnan(found.tokens_per_second)
    assert found.decode.n == 0
    assert found.whole.mean == pytest.approx(found.prefill.mean) == pytest.approx(2.0)


def test_a_text_that_ends_at_once_is_not_taken_for_one_that_decodes_in_no_time() -> None:
    table = timings(1.0)
    ended = (table["config_name"] == "fast") & (table["round"] == 3)
    table.loc[ended, ["num_output_tokens", "decode_time_sec"]] = [1, 0.0]
    found = speed_ups(table, ["topk_8", "fast"], "topk_8")["fast"]
    assert found.whole.n == found.decode.n == ROUNDS - 1
    assert found.whole.mean == pytest.approx(1.0)


def test_a_clock_too_coarse_for_a_token_gives_no_speed() -> None:
    found = speed_ups(timings(1.0).assign(decode_time_sec=0.0), ["fast"], "topk_8")["fast"]
    assert found.decode_ms == 0.0
    assert math.isnan(found.tokens_per_second)
