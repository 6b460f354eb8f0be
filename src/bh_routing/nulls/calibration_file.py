"""The layout of a calibration file, and a reader that trusts none of it.

Axes: N reference scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.nulls.base import ReferenceTable

FORMAT: Final = "bh_routing.calibration"
SCHEMA: Final = 1
_REMEDY: Final = "run: bh-routing calibrate --model NAME"


class CalibrationFacts(BaseModel):
    """Where the tables came from: the part of the header that the fingerprint covers."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    nulls: list[str]
    model_fingerprint: str
    num_layers: PositiveInt
    num_experts: PositiveInt
    model_top_k: PositiveInt
    num_tokens: PositiveInt
    num_documents: PositiveInt
    text_sha256: str
    seed: int
    table_capacity: PositiveInt


class CalibrationParts(NamedTuple):
    """What a file holds, validated but for its fingerprint."""

    facts: CalibrationFacts
    tables: dict[str, tuple[ReferenceTable, ...]]
    fingerprint: str
    created_at: str


def read_calibration(path: Path) -> CalibrationParts:
    """Read the header and every table.

    Raises:
        CalibrationError: one sentence that says what is wrong with the file.
    """
    if not path.is_file():
        raise CalibrationError(f"calibration {path} does not exist or is no file; {_REMEDY}")
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path} is no calibration or is damaged ({error}); {_REMEDY}"
        ) from error
    facts = _read_facts(path, header)
    tables = {
        null: tuple(_take(path, tensors, f"{null}.{layer}") for layer in range(facts.num_layers))
        for null in facts.nulls
    }
    if tensors:
        raise CalibrationError(
            f"calibration {path} holds {len(tensors)} tensors that its header doesn't name, such "
            f"as {min(tensors)!r}; {_REMEDY}"
        )
    return CalibrationParts(
        facts, tables, header.get("fingerprint", ""), header.get("created_at", "")
    )


def _read_facts(path: Path, header: dict[str, str]) -> CalibrationFacts:
    if header.get("format") != FORMAT:
        raise CalibrationError(
            f"{path} is a safetensors file, but no calibration of bh-routing; {_REMEDY}"
        )
    if header.get("schema") != str(SCHEMA):
        raise CalibrationError(
            f"calibration {path} has schema {header.get('schema')!r}, this version reads "
            f"{SCHEMA}; {_REMEDY}"
        )
    try:
        return CalibrationFacts.model_validate_json(header.get("facts", ""))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "facts"
        raise CalibrationError(
            f"calibration {path} has unreadable facts ({where}: {first['msg']}); {_REMEDY}"
        ) from error


def _take(path: Path, tensors: dict[str, Tensor], name: str) -> ReferenceTable:
    """Remove a tensor from `tensors` and return it as a table, if it is one."""
    if name not in tensors:
        raise CalibrationError(f"calibration {path} lacks the table {name!r}; {_REMEDY}")
    scores_N = tensors.pop(name)
    if scores_N.dtype != torch.float32 or scores_N.ndim != 1 or scores_N.numel() == 0:
        raise CalibrationError(
            f"table {name!r} of calibration {path} must be float32 of shape (N,), got "
            f"{scores_N.dtype} of shape {tuple(scores_N.shape)}; {_REMEDY}"
        )
    if not bool(scores_N.isfinite().all()):
        raise CalibrationError(
            f"table {name!r} of calibration {path} has NaN or infinite scores; {_REMEDY}"
        )
    if bool((scores_N.diff() < 0).any()):
        raise CalibrationError(f"table {name!r} of calibration {path} isn't sorted; {_REMEDY}")
    return ReferenceTable(scores_N)
