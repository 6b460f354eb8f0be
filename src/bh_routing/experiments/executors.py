"""Executors of experiments, the choice of thread numbers, and the loop over all experiments."""

from __future__ import annotations

import logging
import os
import statistics
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, NamedTuple

import torch
from tqdm import tqdm

from bh_routing.engine.score import score
from bh_routing.engine.windows import TokenizedDocument
from bh_routing.experiments.configurations import NamedRule
from bh_routing.experiments.experiment import (
    OUT_OF_MEMORY,
    Experiment,
    Subject,
    failed_experiment,
    is_out_of_memory,
    release_memory,
    run_experiment,
    warm_up,
)
from bh_routing.experiments.identity import experiment_key
from bh_routing.experiments.run_log import FILE_ONLY
from bh_routing.experiments.spec_errors import shorten
from bh_routing.experiments.specs import Prompt
from bh_routing.experiments.store import ResultStore
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.records import STATUS_OK, ExperimentRecord, QualityRecord
from bh_routing.rules.base import Rule

LARGE_MODEL: Final = 500_000_000
"""Number of parameters from which all cores pay off and timing costs more than it gains."""
BATCH_TOKENS: Final = 256
TIMED_SEC: Final = 0.4
MOST_TIMED: Final = 9
GAIN: Final = 0.95
"""More threads must take less than this fraction of the smaller number's time."""


class Threads(NamedTuple):
    """Numbers of threads."""

    decode: int
    """For one token per forward pass."""
    batch: int
    """For many tokens per forward pass: calibration and scoring."""


def choose_threads(model: Any) -> Threads:
    """Choose numbers of threads by timing the model's forward pass on a CPU.

    Each operation waits for its slowest thread, so the best number depends on the model's size and
    on the machine's load. OMP_NUM_THREADS takes precedence; large models and other devices use
    torch's default.
    """
    most = torch.get_num_threads()
    is_small = sum(parameter.numel() for parameter in model.parameters()) < LARGE_MODEL
    if model.device.type != "cpu" or not is_small or "OMP_NUM_THREADS" in os.environ:
        return Threads(most, most)
    return Threads(*(_fastest(model, num_tokens, most) for num_tokens in (1, BATCH_TOKENS)))


@torch.inference_mode()
def _fastest(model: Any, num_tokens: int, most: int) -> int:
    token_1T = torch.arange(1, num_tokens + 1).unsqueeze(0)
    best, best_sec = 1, _seconds(model, token_1T, 1)
    number = 2
    while number <= most:
        seconds = _seconds(model, token_1T, number)
        if seconds > GAIN * best_sec:
            break
        best, best_sec = number, seconds
        number = most if number < most < 2 * number else 2 * number
    return best


def _seconds(model: Any, token_1T: torch.Tensor, number: int) -> float:
    """Return the median time of a forward pass on `number` threads, after an untimed pass."""
    seconds: list[float] = []
    with torch_threads(number):
        model(input_ids=token_1T, use_cache=False, logits_to_keep=1)
        while len(seconds) < MOST_TIMED and sum(seconds) < TIMED_SEC:
            start = time.perf_counter()
            model(input_ids=token_1T, use_cache=False, logits_to_keep=1)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Set torch's number of threads inside the block."""
    earlier = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(earlier)


log = logging.getLogger(__name__)


class Cell(NamedTuple):
    """One experiment of the grid."""

    key: str
    named_rule: NamedRule
    prompt: Prompt


class ScoreSettings(NamedTuple):
    """Arguments of `engine.score.score`."""

    window: int
    stride: int
    batch_size: int | None = None
    decode_batch: int | None = None
    only: frozenset[str] | None = None


class Executor(AbstractContextManager["Executor"]):
    """Runs experiments and scores text, without writing files.

    Except for times, rows and records don't depend on the executor; their order may, and
    in emulated decode steps the rounding.
    """

    @abstractmethod
    def run(self, cells: Sequence[Cell], max_tokens: int) -> Iterator[tuple[Cell, Experiment]]:
        """Yield each experiment as soon as it is finished; failures yield failed rows."""

    @abstractmethod
    def score(
        self,
        documents: Sequence[TokenizedDocument],
        rules: Mapping[str, Rule],
        settings: ScoreSettings,
    ) -> Iterator[QualityRecord]:
        """Yield one record per rule and document, as groups of documents are finished."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the executor's entry in run.json."""

    def close(self) -> None:
        """Release all resources; may be called twice."""
        release_memory()

    def __exit__(self, *_: object) -> None:
        self.close()


class SerialExecutor(Executor):
    """Runs experiments one after another, in this process."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._warm = ""

    def run(self, cells: Sequence[Cell], max_tokens: int) -> Iterator[tuple[Cell, Experiment]]:
        """Run the cells in order, with a warm-up before the first cell of each configuration."""
        for cell in cells:
            if cell.named_rule.name != self._warm:
                release_memory()
                _warm_up(self._subject, cell)
                self._warm = cell.named_rule.name
            yield cell, attempt(self._subject, cell, max_tokens)

    def score(
        self,
        documents: Sequence[TokenizedDocument],
        rules: Mapping[str, Rule],
        settings: ScoreSettings,
    ) -> Iterator[QualityRecord]:
        """Score the documents in order."""
        model, tokenizer, calibration = self._subject
        return score(model, tokenizer, documents, rules, calibration, **settings._asdict())

    def describe(self) -> dict[str, Any]:
        """Return the executor's entry in run.json."""
        return {"name": "local"}


def attempt(
    subject: Subject,
    cell: Cell,
    max_tokens: int,
    experiment: Callable[[Subject, NamedRule, Prompt, int], Experiment] = run_experiment,
) -> Experiment:
    """Run one experiment, twice if out of memory; any failure becomes a failed row."""
    problem = ""
    for _ in range(2):
        try:
            return experiment(subject, cell.named_rule, cell.prompt, max_tokens)
        except Exception as error:  # one experiment must not end the run
            if not is_out_of_memory(error):
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
                log.debug("traceback of the failure", exc_info=error, extra=FILE_ONLY)
                break
        # Outside the except block, where the traceback no longer references the tensors.
        problem = OUT_OF_MEMORY.replace(";", ", twice;", 1)
        release_memory()
    return give_up(cell, problem)


def give_up(cell: Cell, problem: str) -> Experiment:
    """Log that an experiment failed, and return its row."""
    name = f"{cell.named_rule.name} on {shorten(cell.prompt.text)!r}"
    log.warning("%s failed: %s", name, problem)
    return failed_experiment(cell.named_rule, cell.prompt, problem)


def _warm_up(subject: Subject, cell: Cell) -> None:
    try:
        warm_up(subject, cell.named_rule, cell.prompt)
    except Exception as error:  # noqa: BLE001  # the experiment itself will fail and be recorded
        log.debug("the warm-up of %s failed: %s", cell.named_rule.name, error)


def make_grid(
    rules: Sequence[NamedRule], prompts: Sequence[Prompt], calibration: Calibration | None = None
) -> list[Cell]:
    """Return every pair of configuration and prompt, configurations outermost, in spec order."""
    return [
        Cell(experiment_key(named_rule, prompt, calibration), named_rule, prompt)
        for named_rule in rules
        for prompt in prompts
    ]


def run_grid(executor: Executor, grid: Sequence[Cell], max_tokens: int, store: ResultStore) -> int:
    """Run the missing and the failed experiments of the store; return their number."""
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
