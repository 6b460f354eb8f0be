"""Interleaved timing of the configurations, on which every reported speed-up is based.

Experiments run once, one configuration after another, so other load on the machine would look like
a difference between rules. Here each round times every configuration on one prompt, in a new random
order, after an untimed round.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from tqdm import tqdm

from bh_routing.engine.generate import generate_routed
from bh_routing.errors import ResultsError
from bh_routing.experiments.configurations import NamedRule
from bh_routing.experiments.executors import Cell
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.identity import experiment_key
from bh_routing.experiments.specs import Prompt
from bh_routing.results.files import read_csv, render_csv, write_atomically
from bh_routing.results.records import TIMING_COLUMNS, TIMINGS, RoundTiming

MOST_TOKENS: Final = 16
"""Maximum number of tokens generated per round: enough to time one, without a long run."""


def write_timing_rounds(
    folder: Path,
    subject: Subject,
    grid: Sequence[Cell],
    *,
    num_rounds: int,
    max_tokens: int,
    seed: int,
) -> None:
    """Time the configurations of a run and write `timings.csv`.

    Earlier timings of the folder are kept if they are of the same experiments and rounds, since
    only interleaved timings can be compared.

    Args:
        folder: the run's folder.
        subject: model, tokenizer and calibration.
        grid: the finished experiments of the run; an empty grid removes the file.
        num_rounds: number of timed rounds; 0 removes the file.
        max_tokens: maximum number of tokens that the run generates per prompt.
        seed: seed of the orders.
    """
    path = folder / TIMINGS
    if num_rounds == 0 or not grid:
        path.unlink(missing_ok=True)
        return
    rules = list({cell.named_rule.name: cell.named_rule for cell in grid}.values())
    prompts = list({cell.prompt.text: cell.prompt for cell in grid}.values())
    turns = [prompts[i % len(prompts)] for i in range(num_rounds)]
    keys = {
        (round_, experiment_key(rule, prompt, subject.calibration))
        for round_, prompt in enumerate(turns, start=1)
        for rule in rules
    }
    if _timed(path) == keys:
        return
    rows = time_rounds(subject, rules, prompts, num_rounds, min(max_tokens, MOST_TOKENS), seed)
    bar = tqdm(rows, desc="timing", total=num_rounds * len(rules))
    write_atomically(path, render_csv(map(asdict, bar), TIMING_COLUMNS))


def time_rounds(
    subject: Subject,
    rules: Sequence[NamedRule],
    prompts: Sequence[Prompt],
    num_rounds: int,
    num_tokens: int,
    seed: int,
) -> Iterator[RoundTiming]:
    """Yield one timing per round and configuration; rounds cycle through the prompts."""
    model, tokenizer, calibration = subject
    generator = random.Random(seed)
    for round_ in range(num_rounds + 1):
        prompt = prompts[(round_ - 1) % len(prompts)]
        for rule in generator.sample(rules, len(rules)):
            generation, _ = generate_routed(
                model, tokenizer, prompt.text, num_tokens, rule.rule, calibration
            )
            if round_:
                yield RoundTiming(
                    key=experiment_key(rule, prompt, calibration),
                    round=round_,
                    config_name=rule.name,
                    prompt_text=prompt.text,
                    num_input_tokens=generation.num_input_tokens,
                    num_output_tokens=len(generation.token_ids),
                    prefill_time_sec=generation.prefill_time_sec,
                    decode_time_sec=generation.decode_time_sec,
                )


def _timed(path: Path) -> set[tuple[int, str]]:
    """Return round and experiment of every existing row."""
    if not path.is_file():
        return set()
    try:
        rows = read_csv(path, TIMING_COLUMNS)
        return {(int(row["round"]), row["key"]) for row in rows}
    except (ResultsError, ValueError):
        return set()  # edited, or of another program or version: time again
