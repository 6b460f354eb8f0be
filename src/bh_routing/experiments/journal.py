"""The truth about a run: an append-only file, one fsynced line per finished experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, get_type_hints

from pydantic import TypeAdapter, ValidationError

from bh_routing.errors import ResultsError
from bh_routing.experiments.chained_lines import ChainedWriter, read_chained
from bh_routing.records import ExperimentDetail, ExperimentRecord
from bh_routing.results.json_lines import JsonLines

WAYS_OUT: Final = "start over with --no-resume, or choose another --output"
_FLOAT_FIELDS: Final = frozenset(
    name for name, kind in get_type_hints(ExperimentRecord).items() if kind is float
)
_KEY: Final = TypeAdapter(str)
_RECORD: Final = TypeAdapter(ExperimentRecord)
_DETAIL: Final = TypeAdapter(ExperimentDetail)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One finished experiment."""

    key: str
    record: ExperimentRecord
    detail: ExperimentDetail
    checksum: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalContent:
    """What is on disk and fits its checksums; the default is a journal that doesn't exist yet."""

    entries: list[Entry] = field(default_factory=list)
    chain: JsonLines = field(default_factory=JsonLines)


def read_journal(path: Path, seed: str) -> JournalContent:
    """Read the entries of a journal and check the chain of checksums.

    Args:
        path: the journal; a missing file is an empty journal.
        seed: what the first checksum builds on: the run's own fingerprint.
    Raises:
        ResultsError: a line doesn't fit its checksum, or isn't a line of a journal.
    """
    chain = read_chained(path, seed, WAYS_OUT)
    entries = [
        _entry(body, checksum, where=f"line {number} of {path}")
        for number, (body, checksum) in enumerate(
            zip(chain.objects, chain.checksums, strict=True), start=1
        )
    ]
    return JournalContent(entries=entries, chain=chain)


class JournalWriter:
    """Append entries to a journal; each is on disk when `append` returns."""

    def __init__(self, path: Path, content: JournalContent, seed: str) -> None:
        self._writer = ChainedWriter(path, content.chain, seed)

    def append(self, key: str, record: ExperimentRecord, detail: ExperimentDetail) -> Entry:
        """Write one line and wait until the disk has it; ResultsError if it can't be written."""
        body = {"key": key, "record": to_values(record), "detail": to_values(detail)}
        checksum = self._writer.append(body)
        return Entry(key=key, record=record, detail=detail, checksum=checksum)

    def check_place(self) -> None:
        """Raise ResultsError if the journal was removed or replaced meanwhile."""
        self._writer.check_place()

    def close(self) -> None:
        """Let go of the file."""
        self._writer.close()


def to_values(item: ExperimentRecord | ExperimentDetail) -> dict[str, Any]:
    """Return field -> value; `asdict` would copy every list number by number."""
    return {f.name: getattr(item, f.name) for f in fields(item)}


def _entry(body: Mapping[str, Any], checksum: str, where: str) -> Entry:
    try:
        return Entry(
            key=_KEY.validate_python(body["key"]),
            record=_record(body["record"]),
            detail=_DETAIL.validate_python(body["detail"], extra="forbid"),
            checksum=checksum,
        )
    except (KeyError, AttributeError, ValidationError) as error:
        raise ResultsError(f"{where} isn't an experiment; {WAYS_OUT}") from error


def _record(values: Mapping[str, Any]) -> ExperimentRecord:
    restored: dict[str, Any] = {
        name: float("nan") if value is None and name in _FLOAT_FIELDS else value
        for name, value in values.items()
    }
    return _RECORD.validate_python(restored, extra="forbid")
