"""Score quality document by document, and store each record at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from bh_routing.engine.texts import Document, packaged_documents, read_documents
from bh_routing.engine.windows import TokenizedDocument
from bh_routing.errors import ExperimentError, ResultsError
from bh_routing.experiments.executors import Executor, ScoreSettings, SerialExecutor
from bh_routing.experiments.experiment import Subject, find_nan
from bh_routing.experiments.identity import RunIdentity, rule_key
from bh_routing.experiments.quality_text import QualityText
from bh_routing.experiments.specs import ScoredSpec
from bh_routing.results.journal import Journal, as_object, digest, parse_quality
from bh_routing.results.records import QUALITY_JOURNAL, QualityRecord
from bh_routing.rules.base import Rule
from bh_routing.rules.fixed import TopK

_REMEDY: Final = (
    f"choose another --output, or move {QUALITY_JOURNAL} away to have everything scored anew"
)
_KEY_LENGTH: Final = 16
_SEED: Final = digest("quality")


class QualityLedger:
    """`quality.jsonl`: a header that identifies the text, then one line per rule and document.

    Nothing is written before `begin`.

    Args:
        folder: the results folder.
        text: the text to score.
        identity: properties that all results of the folder share, such as the model.
    """

    def __init__(self, folder: Path, text: QualityText, identity: RunIdentity) -> None:
        self.text = text
        self._path = folder / QUALITY_JOURNAL
        self._header = {
            "text_sha256": text.sha256,
            "max_tokens": text.max_tokens,
            "window": text.window,
            "stride": text.stride,
            "decode_batch": text.decode_batch,
        }
        self._identity = identity
        self._journal: Journal[dict[str, Any]] = Journal(path=self._path, seed=_SEED)
        self._records: dict[str, QualityRecord] = {}
        self._lines: dict[tuple[str, str], QualityRecord] = {}

    @classmethod
    def resume(cls, folder: Path, text: QualityText, identity: RunIdentity) -> QualityLedger:
        """Read the scores of an earlier run, and check that they are of this text and model.

        Raises:
            ResultsError: the file holds scores of another text, setting or model, or was edited.
        """
        ledger = cls(folder, text, identity)
        ledger._read()
        return ledger

    def begin(self) -> None:
        """Open the file for writing; the folder must exist.

        Raises:
            ResultsError: the folder is missing or not writable.
        """
        # Not in a new folder: if the run's own was moved, its results are elsewhere.
        self._journal.open()
        if not self._journal.checksums:
            header = {**self._header, "identity": self._identity.of_scores()}
            self._journal.append({"header": header})

    def __contains__(self, key: str) -> bool:
        """Return whether a rule and document were scored, under any name."""
        return key in self._records

    def add(self, key: str, record: QualityRecord) -> None:
        """Append one record, which is on disk when this returns."""
        self._journal.append({"key": key, "record": asdict(record)})
        self._remember(key, record)

    def labelled(self, key: str, config_name: str, document: TokenizedDocument) -> QualityRecord:
        """Return a record under its current names, and append it under them if they changed."""
        record = replace(
            self._records[key],
            config_name=config_name,
            document=document.name,
            cluster=document.cluster,
            domain=document.domain,
        )
        if self._lines.get((key, config_name)) != record:
            self.add(key, record)
        return record

    def __enter__(self) -> QualityLedger:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def _remember(self, key: str, record: QualityRecord) -> None:
        self._records[key] = self._lines[key, record.config_name] = record

    def _read(self) -> None:
        self._journal = Journal.resume(self._path, as_object, seed=_SEED, remedy=_REMEDY)
        for number, body in enumerate(self._journal.items):
            if number == 0:
                self._check_header(body.get("header"))
                continue
            try:
                record = parse_quality(body["record"])
                self._remember(str(body["key"]), record)
            except (KeyError, TypeError, ValidationError) as error:
                raise ResultsError(
                    f"line {number + 1} of {self._path} isn't a quality record; {_REMEDY}"
                ) from error

    def _check_header(self, found: Any) -> None:
        found = found if isinstance(found, Mapping) else {}
        differences = [
            f"{name}: {found.get(name)} there, {value} now"
            for name, value in self._header.items()
            if found.get(name) != value
        ]
        own = replace(self._identity, max_tokens=None, chat_template=None)
        differences += own.differences(found.get("identity", {}))
        if differences:
            raise ResultsError(
                f"{self._path} holds scores of another text or setting "
                f"({'; '.join(differences)}); {_REMEDY}"
            )


def score_missing(
    subject: Subject,
    ledger: QualityLedger,
    rules: Mapping[str, Rule],
    executor: Executor | None = None,
) -> list[QualityRecord]:
    """Score every rule on every document that the ledger lacks.

    The key of a record is its rule, the tables that the rule reads, and its document: a name with a
    new rule is scored again, a rule with a new name isn't.

    Args:
        subject: the model; its calibration is required if a rule needs one.
        ledger: open for writing; receives each record as soon as its document is finished.
        rules: configuration name -> rule.
        executor: where text is scored; None: in this process.
    Returns:
        One record per rule and document, rules outermost, both in order.
    Raises:
        ExperimentError: the model gave NaN, and the message names the first router; or it gave a
            token of the text probability 0.
    """
    text, executor = ledger.text, executor or SerialExecutor(subject)
    rule_keys = {name: rule_key(rule, subject.calibration) for name, rule in rules.items()}
    once: dict[str, str] = {}  # the first of equal rules is scored
    for name, key in rule_keys.items():
        once.setdefault(key, name)
    keys = {
        (name, document.key): digest([key, document.key])[:_KEY_LENGTH]
        for name, key in rule_keys.items()
        for document in text.documents
    }
    missing: dict[tuple[str, ...], list[TokenizedDocument]] = defaultdict(list)
    for document in text.documents:
        names = tuple(n for n in once.values() if keys[n, document.key] not in ledger)
        if names:
            missing[names].append(document)
    total = sum(len(d.ids) * len(names) for names, group in missing.items() for d in group)
    with tqdm(total=total, unit="token", desc="quality", unit_scale=True) as bar:
        for names, group in missing.items():
            part = {name: rules[name] for name in names}
            settings = ScoreSettings(text.window, text.stride, text.batch_size)
            if text.decode_batch is not None:
                # Steps are those of the whole text, whatever part of it is missing.
                settings = settings._replace(
                    decode_batch=text.decode_batch, only=frozenset(d.key for d in group)
                )
                group = list(text.documents)
            for record in executor.score(group, part, settings):
                if not _is_finite(record):
                    raise ExperimentError(_why_not_finite(subject, text, rules, record))
                ledger.add(keys[record.config_name, record.document_key], record)
                bar.update(record.tokens)
    return [
        ledger.labelled(keys[name, document.key], name, document)
        for name in rules
        for document in text.documents
    ]


def _is_finite(record: QualityRecord) -> bool:
    """Return whether every number of a record is finite, as its readers require."""
    numbers = [v for v in asdict(record).values() if isinstance(v, float)]
    return bool(np.isfinite([*numbers, *record.jaccard_sum]).all())


def _why_not_finite(
    subject: Subject, text: QualityText, rules: Mapping[str, Rule], record: QualityRecord
) -> str:
    if math.isinf(record.nll_sum) or math.isinf(record.top_k_nll_sum):
        return (
            f"{record.config_name} on {record.document}: a token of the text has probability 0, so "
            "the loss is infinite; leave that text out, or use a model that masks no token of it"
        )
    document = next(d for d in text.documents if d.key == record.document_key)
    ids = document.ids[: text.window]
    where = find_nan(subject.model, rules[record.config_name], subject.calibration, ids)
    return f"{record.config_name} on {record.document}: {where}"


def scored_documents(spec: ScoredSpec) -> list[Document]:
    """Read the documents to score.

    Raises:
        InputError: a document can't be read.
    """
    return read_documents(spec.texts) if spec.texts else packaged_documents("evaluation")


def score_with_references(
    subject: Subject,
    ledger: QualityLedger,
    rules: Mapping[str, Rule],
    executor: Executor | None = None,
) -> list[QualityRecord]:
    """Score like `score_missing`, then static top-k below and above each mean.

    Returns:
        The records of all configurations, of the static ones last.
    """
    records = score_missing(subject, ledger, rules, executor)
    static = static_references(rules, records)
    return records + score_missing(subject, ledger, static, executor)


def static_references(
    rules: Mapping[str, Rule], records: Iterable[QualityRecord]
) -> dict[str, TopK]:
    """Return the static top-k rules for comparisons at equal cost.

    For each configuration with a fractional mean k, these are the integers below and above it,
    without rules that are configured already.

    Args:
        rules: configuration name -> rule.
        records: their scores.
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
