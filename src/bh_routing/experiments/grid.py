"""The loop over configurations and prompts: each experiment once, whatever happens to one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from bh_routing.experiments.experiment import (
    Experiment,
    Subject,
    failed_experiment,
    run_experiment,
    warm_up,
)
from bh_routing.experiments.failures import OUT_OF_MEMORY, is_out_of_memory, release_memory
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
    num_done = sum(store.finished_record(cell.key) is not None for cell in grid)
    with tqdm(
        total=len(grid),
        initial=num_done,
        desc="experiments",
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        for named_rule in rules:
            cells, means = [], []
            for cell in grid:
                if cell.named_rule is not named_rule:
                    continue
                if (done := store.finished_record(cell.key)) is None:
                    cells.append(cell)
                else:
                    means.append(done.avg_experts_per_token)
            if not cells:
                continue
            _warm_up(subject, cells[0])
            for cell in cells:
                experiment = attempt(subject, cell, max_tokens)
                store.add(cell.key, experiment.record, experiment.detail)
                num_run += 1
                if experiment.record.status == STATUS_OK:
                    means.append(experiment.record.avg_experts_per_token)
                _report_progress(bar, cell, experiment.record, means)
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
        problem = OUT_OF_MEMORY.replace(";", ", twice;", 1)
        release_memory()
    name = f"{cell.named_rule.name} on {shorten(cell.prompt.text)!r}"
    log.warning("%s failed: %s", name, problem)
    return failed_experiment(cell.named_rule, cell.prompt, problem)


def _warm_up(subject: Subject, cell: Cell) -> None:
    try:
        warm_up(subject, cell.named_rule, cell.prompt)
    except Exception as error:  # noqa: BLE001  # the experiment itself will fail and be recorded
        log.debug("the warm-up of %s failed: %s", cell.named_rule.name, error)


def _report_progress(
    bar: tqdm[Any], cell: Cell, record: ExperimentRecord, means: Sequence[float]
) -> None:
    name = cell.named_rule.name
    running = f"{sum(means) / len(means):.2f}" if means else "-"
    bar.set_postfix(config=name, experts=running, refresh=False)
    bar.update()
    if record.status != STATUS_OK:
        return
    log.info(
        "[%d/%d] %s on %r: %.2f experts (running mean %s), %d tokens in %.2f s",
        bar.n,
        bar.total,
        name,
        shorten(cell.prompt.text),
        record.avg_experts_per_token,
        running,
        record.num_output_tokens,
        record.inference_time_sec,
        extra=FILE_ONLY,
    )
