"""The part of a run that scores every configuration on evaluation text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bh_routing.engine.texts import Document, packaged_documents, read_documents
from bh_routing.experiments.executors import Executor
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.identity import RunIdentity
from bh_routing.experiments.quality import QualityLedger, prepare_text, score_missing
from bh_routing.experiments.spec import NamedRule, RunSpec
from bh_routing.models.discovery import ModelFacts
from bh_routing.records import QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.top_k import TopK


def scored_documents(spec: RunSpec) -> list[Document]:
    """Read the documents that a run scores.

    Raises:
        InputError: they can't be read.
    """
    if spec.eval_text is None:
        return packaged_documents("evaluation")
    return read_documents([spec.eval_text])


class QualityPhase:
    """Text that was read and tokenized before the run began; a mistake in it shows early.

    Raises:
        InputError: the text can't be read, or there is nothing to score.
    """

    def __init__(self, spec: RunSpec, tokenizer: Any, facts: ModelFacts) -> None:
        self._text = prepare_text(
            tokenizer,
            facts,
            scored_documents(spec),
            max_tokens=spec.eval_tokens,
            batch_size=spec.batch_size,
        )

    def ledger(self, folder: Path, identity: RunIdentity) -> QualityLedger:
        """Read what an earlier run of the folder scored; writes nothing.

        Raises:
            ResultsError: it scored another text or setting, or was edited.
        """
        return QualityLedger(folder, self._text, identity)

    def score(
        self,
        folder: Path,
        identity: RunIdentity,
        subject: Subject,
        rules: Sequence[NamedRule],
        executor: Executor,
    ) -> list[str]:
        """Score what the folder lacks, then static top-k on both sides of each mean.

        Returns:
            Names of the configurations that are scored now, the static ones last.
        """
        by_name = {named.name: named.rule for named in rules}
        with self.ledger(folder, identity) as ledger:

            def score_all(part: Mapping[str, Rule]) -> list[QualityRecord]:
                return score_missing(
                    subject.model,
                    subject.tokenizer,
                    self._text,
                    part,
                    subject.calibration,
                    ledger,
                    executor,
                )

            references = static_references(by_name, score_all(by_name))
            score_all(references)
        return [*by_name, *references]


def static_references(
    rules: Mapping[str, Rule], records: Iterable[QualityRecord]
) -> dict[str, TopK]:
    """Return the static top-k rules that the others must be compared with at equal cost.

    For each configuration with a fractional mean k, the whole numbers on both sides of it, but
    rules that are configured already.

    Args:
        rules: configuration name -> rule.
        records: what was scored under them.
    Returns:
        Name -> rule; `topk_4` for four experts, or `static_4` if that name stands for another rule.
    """
    experts: dict[str, int] = defaultdict(int)
    units: dict[str, int] = defaultdict(int)
    for record in records:
        experts[record.config_name] += record.experts_sum
        units[record.config_name] += record.units
    means = [experts[name] / units[name] for name in experts]
    needed = {k for mean in means for k in (math.floor(mean), math.ceil(mean))}
    missing = [TopK(k=k) for k in sorted(needed) if TopK(k=k) not in rules.values()]
    return {_free_name(rule, rules): rule for rule in missing}


def _free_name(rule: TopK, taken: Container[str]) -> str:
    name = f"topk_{rule.k}"
    while name in taken:
        name = f"static_{name.removeprefix('topk_')}"
    return name
