"""The loop over configurations and prompts: each experiment once, whatever happens to one."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bh_routing.experiments.experiment import (
    Experiment,
    Subject,
    failed_experiment,
    run_experiment,
    warm_up,
)
from bh_routing.experiments.identity import experiment_key
from bh_routing.experiments.run_log import FILE_ONLY
from bh_routing.experiments.spec import NamedRule, Prompt, shorten
from bh_routing.experiments.store import ResultStore
from bh_routing.records import STATUS_OK, ExperimentRecord

log = logging.getLogger(__name__)


class Cell(NamedTuple):
    """One experiment to do."""

    key: str
    named_rule: NamedRule
    prompt: Prompt


def make_grid(rules: Sequence[NamedRule], prompts: Sequence[Prompt]) -> list[Cell]:
    """Return every pair, configurations outermost, in the order of the spec."""
    return [
        Cell(experiment_key(named_rule, prompt), named_rule, prompt)
        for named_rule in rules
        for prompt in prompts
    ]


def run_grid(
    subject: Subject,
    rules: Sequence[NamedRule],
    grid: Sequence[Cell],
    max_tokens: int,
    store: ResultStore,
) -> int:
    """Run the experiments that the store lacks, failed ones again; return how many ran."""
    num_run = 0
    pending = [cell for cell in grid if store.finished_record(cell.key) is None]
    with tqdm(
        total=len(grid),
        initial=len(grid) - len(pending),
        desc="experiments",
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        for named_rule in rules:
            cells = [cell for cell in pending if cell.named_rule is named_rule]
            if not cells:
                continue
            _warm_up(subject, cells[0])
            for cell in cells:
                experiment = attempt(subject, cell, max_tokens)
                store.add(cell.key, experiment.record, experiment.detail)
                num_run += 1
                _report_progress(bar, store, grid, cell, experiment.record)
            release_memory()
    return num_run


def attempt(
    subject: Subject,
    cell: Cell,
    max_tokens: int,
    experiment: Callable[[Subject, NamedRule, Prompt, int], Experiment] = run_experiment,
) -> Experiment:
    """Do one experiment; out of memory is tried twice, and any failure becomes a failed row."""
    problem = ""
    for _ in range(2):
        try:
            return experiment(subject, cell.named_rule, cell.prompt, max_tokens)
        except Exception as error:  # one experiment must not end the run
            if not is_out_of_memory(error):
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
                log.debug("traceback of the failure", exc_info=error, extra=FILE_ONLY)
                break
        # Out of the except block: the traceback has let go of the tensors by now.
        problem = (
            "out of memory, twice; use --device cpu, a smaller --max-tokens, or a smaller dtype "
            "(leave out --no-fp16)"
        )
        release_memory()
    name = f"{cell.named_rule.name} on {shorten(cell.prompt.text)!r}"
    log.warning("%s failed: %s", name, problem)
    return failed_experiment(cell.named_rule, cell.prompt, problem)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that the device or the machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU torch raises a plain RuntimeError, with only its text to go by.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give unused memory back, to the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _warm_up(subject: Subject, cell: Cell) -> None:
    try:
        warm_up(subject, cell.named_rule, cell.prompt)
    except Exception as error:  # noqa: BLE001  # the experiment itself will fail and be recorded
        log.debug("the warm-up of %s failed: %s", cell.named_rule.name, error)


def _report_progress(
    bar: tqdm[Any],
    store: ResultStore,
    grid: Sequence[Cell],
    cell: Cell,
    record: ExperimentRecord,
) -> None:
    name = cell.named_rule.name
    means = [
        done.avg_experts_per_token
        for other in grid
        if other.named_rule is cell.named_rule
        and (done := store.finished_record(other.key)) is not None
    ]
    running = f"{sum(means) / len(means):.2f}" if means else "-"
    bar.set_postfix(config=name, experts=running, refresh=False)
    bar.update()
    if record.status != STATUS_OK:
        return
    log.info(
        "[%d/%d] %s on %r: %.2f experts (running mean %s), %d tokens in %.2f s",
        bar.n,
        len(grid),
        name,
        shorten(cell.prompt.text),
        record.avg_experts_per_token,
        running,
        record.num_output_tokens,
        record.inference_time_sec,
        extra=FILE_ONLY,
    )
