"""The loop over configurations and prompts: each experiment once, whatever happens to one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from bh_routing.experiments.executors import Cell, Executor
from bh_routing.experiments.identity import experiment_key
from bh_routing.experiments.run_log import FILE_ONLY
from bh_routing.experiments.spec import NamedRule, Prompt, shorten
from bh_routing.experiments.store import ResultStore
from bh_routing.nulls.calibration import Calibration
from bh_routing.records import STATUS_OK, ExperimentRecord

log = logging.getLogger(__name__)


def make_grid(
    rules: Sequence[NamedRule], prompts: Sequence[Prompt], calibration: Calibration | None = None
) -> list[Cell]:
    """Return every pair, configurations outermost, in the order of the spec."""
    return [
        Cell(experiment_key(named_rule, prompt, calibration), named_rule, prompt)
        for named_rule in rules
        for prompt in prompts
    ]


def run_grid(executor: Executor, grid: Sequence[Cell], max_tokens: int, store: ResultStore) -> int:
    """Run the experiments that the store lacks, failed ones again; return how many ran."""
    cells: list[Cell] = []
    means: dict[str, list[float]] = {cell.named_rule.name: [] for cell in grid}
    for cell in grid:
        if (done := store.finished_record(cell.key)) is None:
            cells.append(cell)
        else:
            means[cell.named_rule.name].append(done.avg_experts_per_token)
    with tqdm(
        total=len(grid),
        initial=len(grid) - len(cells),
        desc="experiments",
        file=sys.stderr,
        dynamic_ncols=True,
    ) as bar:
        for cell, experiment in executor.run(cells, max_tokens):
            store.add(cell.key, experiment.record, experiment.detail)
            if experiment.record.status == STATUS_OK:
                means[cell.named_rule.name].append(experiment.record.avg_experts_per_token)
            _report_progress(bar, cell, experiment.record, means[cell.named_rule.name])
    return len(cells)


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
