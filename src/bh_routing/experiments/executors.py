"""Where experiments run: what an executor is, and the one that runs them in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from bh_routing.engine.score import score
from bh_routing.engine.windows import TokenizedDocument
from bh_routing.experiments.experiment import (
    Experiment,
    Subject,
    failed_experiment,
    run_experiment,
    warm_up,
)
from bh_routing.experiments.failures import OUT_OF_MEMORY, is_out_of_memory, release_memory
from bh_routing.experiments.run_log import FILE_ONLY
from bh_routing.experiments.spec import NamedRule, Prompt, shorten
from bh_routing.records import QualityRecord
from bh_routing.rules.base import Rule

log = logging.getLogger(__name__)


class Cell(NamedTuple):
    """One experiment to do."""

    key: str
    named_rule: NamedRule
    prompt: Prompt


class ScoreSettings(NamedTuple):
    """How text is scored, as `engine.score.score` takes it."""

    window: int
    stride: int
    batch_size: int | None = None


class Executor(Protocol):
    """Does experiments and scores text; a context manager that closes it. It writes no file.

    Rows and records are the same wherever they are made, times apart; only the order in which
    they come may differ.
    """

    def run(self, cells: Sequence[Cell], max_tokens: int) -> Iterator[tuple[Cell, Experiment]]:
        """Yield each experiment as soon as it is finished; a failure is a failed row."""
        ...

    def score(
        self,
        documents: Sequence[TokenizedDocument],
        rules: Mapping[str, Rule],
        settings: ScoreSettings,
    ) -> Iterator[QualityRecord]:
        """Yield one record a rule and document, in groups of documents, as they are finished."""
        ...

    def describe(self) -> dict[str, Any]:
        """Say for run.json where work is done."""
        ...

    def close(self) -> None:
        """Let go of whatever is held; harmless when called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class SerialExecutor:
    """One experiment after the other, in this process."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._warm = ""

    def run(self, cells: Iterable[Cell], max_tokens: int) -> Iterator[tuple[Cell, Experiment]]:
        """Do the cells in their order; the first of each configuration is warmed up before."""
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
        """Score the documents in their order."""
        model, tokenizer, calibration = self._subject
        return score(model, tokenizer, documents, rules, calibration, **settings._asdict())

    def describe(self) -> dict[str, Any]:
        """Say that it is this process."""
        return {"name": "local"}

    def close(self) -> None:
        """Give unused memory back."""
        release_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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
    return give_up(cell, problem)


def give_up(cell: Cell, problem: str) -> Experiment:
    """Say that an experiment failed, and return its row."""
    name = f"{cell.named_rule.name} on {shorten(cell.prompt.text)!r}"
    log.warning("%s failed: %s", name, problem)
    return failed_experiment(cell.named_rule, cell.prompt, problem)


def _warm_up(subject: Subject, cell: Cell) -> None:
    try:
        warm_up(subject, cell.named_rule, cell.prompt)
    except Exception as error:  # noqa: BLE001  # the experiment itself will fail and be recorded
        log.debug("the warm-up of %s failed: %s", cell.named_rule.name, error)
