"""Read the documents scored by a run or by `evaluate` back from `quality.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bh_routing.records import QualityRecord, json_digest
from bh_routing.results.json_lines import read_json_lines
from bh_routing.results.strict_json import half_read


def read_quality(path: Path) -> tuple[QualityRecord, ...]:
    """Read every scored document; of two for one name, rule and document the last counts.

    An older file says neither the rule nor the document's key: its records have an empty rule, and
    the document's name in place of the key.

    A line is the record's fields, alone or under `record`; a line with a `header` is skipped.

    Raises:
        ResultsError: a line isn't a whole record of this schema.
    """
    records: dict[tuple[str, str, str], QualityRecord] = {}
    for number, entry in enumerate(read_json_lines(path).objects, start=1):
        if "header" in entry:
            continue
        values = entry.get("record", entry)
        try:
            record = _record(values)
            key = (record.config_name, json_digest(record.rule), record.document_key)
            records[key] = record
        except (KeyError, TypeError, ValueError) as error:
            raise half_read(path, f"line {number} isn't a quality record ({error})") from error
    return tuple(records.values())


def in_order(record: QualityRecord) -> tuple[str, str]:
    """Sort by name, as people do; the key decides between documents of the same name."""
    return record.document, record.document_key


def _record(values: Mapping[str, Any]) -> QualityRecord:
    values = {"rule": {}, "document_key": values["document"], **values}
    record = QualityRecord(**{f.name: values[f.name] for f in fields(QualityRecord)})
    numbers = (record.nll_sum, record.top_k_nll_sum, record.kl_sum, record.kl_max)
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("a loss isn't a number")
    return record
