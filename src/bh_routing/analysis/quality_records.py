"""Read the documents scored by a run or by `evaluate` back from `quality.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bh_routing.records import QualityRecord
from bh_routing.results.json_lines import read_json_lines
from bh_routing.results.strict_json import half_read


def read_quality(path: Path) -> tuple[QualityRecord, ...]:
    """Read every scored document; of two for one configuration and document the last counts.

    A line is the record's fields, alone or under `record`; a line with a `header` is skipped.

    Raises:
        ResultsError: a line isn't a whole record of this schema.
    """
    records: dict[tuple[str, str], QualityRecord] = {}
    for number, entry in enumerate(read_json_lines(path).objects, start=1):
        if "header" in entry:
            continue
        values = entry.get("record", entry)
        try:
            record = _record(values)
            records[record.config_name, record.document] = record
        except (KeyError, TypeError, ValueError) as error:
            raise half_read(path, f"line {number} isn't a quality record ({error})") from error
    return tuple(records.values())


def _record(values: Mapping[str, Any]) -> QualityRecord:
    record = QualityRecord(**{f.name: values[f.name] for f in fields(QualityRecord)})
    numbers = (record.nll_sum, record.top_k_nll_sum, record.kl_sum, record.kl_max)
    if not all(isinstance(number, int | float) for number in numbers):
        raise ValueError("a loss isn't a number")
    return record
