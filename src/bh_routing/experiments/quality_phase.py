"""The part of a run that scores every configuration on evaluation text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bh_routing.engine.texts import packaged_documents, read_documents
from bh_routing.experiments.experiment import Subject
from bh_routing.experiments.identity import RunIdentity
from bh_routing.experiments.quality import QualityLedger, prepare_text, score_missing
from bh_routing.experiments.spec import NamedRule, RunSpec
from bh_routing.models.discovery import ModelFacts


class QualityPhase:
    """Text that was read and tokenized before the run began; a mistake in it shows early.

    Raises:
        InputError: the text can't be read, or there is nothing to score.
    """

    def __init__(self, spec: RunSpec, tokenizer: Any, facts: ModelFacts) -> None:
        documents = (
            packaged_documents("evaluation")
            if spec.eval_text is None
            else read_documents([spec.eval_text])
        )
        self._text = prepare_text(tokenizer, facts, documents, max_tokens=spec.eval_tokens)

    def ledger(self, folder: Path, identity: RunIdentity) -> QualityLedger:
        """Read what an earlier run of the folder scored; writes nothing.

        Raises:
            ResultsError: it scored another text or setting, or was edited.
        """
        return QualityLedger(folder, self._text, identity.journal_seed())

    def score(
        self, folder: Path, identity: RunIdentity, subject: Subject, rules: Sequence[NamedRule]
    ) -> None:
        """Score what the folder lacks."""
        with self.ledger(folder, identity) as ledger:
            score_missing(
                subject.model,
                subject.tokenizer,
                self._text,
                {named.name: named.rule for named in rules},
                subject.calibration,
                ledger,
            )
