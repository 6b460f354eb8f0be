"""The layout of a calibration file, and a reader that validates all of it.

Axes: N reference scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple, cast, get_args

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.catalog import NULLS
from bh_routing.nulls.contributions import Contributions, Definition, Statistic

FORMAT: Final = "bh_routing.calibration"
SCHEMA: Final = 4
_READABLE: Final = ("2", "3", str(SCHEMA))
"""Schema 3 is schema 4 without passages; schema 2 also lacks observed scores."""
OBSERVED: Final = "observed"
CONTRIBUTIONS: Final = "contributions"
PASSAGES: Final = "passages"
_RESIDUAL_NORMS: Final = "residual_norms"
_KINDS: Final = (("scale", 1), ("all", 1), ("needed", 2), ("cut", 1))
"""Kind of a tensor that describes slots, and the number of words after it."""
_REMEDY: Final = "run: bh-routing calibrate --model NAME --output FILE"


class CalibrationFacts(BaseModel):
    """Provenance of the tables: the part of the header that the fingerprint covers."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    nulls: list[str]
    contributions: list[str]
    """Names of the tensors that describe slots; empty if none were observed."""
    model_fingerprint: str
    num_layers: PositiveInt
    num_experts: PositiveInt
    model_top_k: PositiveInt
    num_tokens: PositiveInt
    num_documents: PositiveInt
    text_sha256: str
    seed: int
    table_capacity: PositiveInt
    observed: list[str] = []
    """Nulls with a sample of observed scores; none in schema 2."""


class CalibrationParts(NamedTuple):
    """Contents of a file, validated except for the fingerprint."""

    facts: CalibrationFacts
    tables: dict[str, tuple[ReferenceTable, ...]]
    observed: dict[str, tuple[Tensor, ...]]
    contributions: Contributions | None
    passages: Tensor
    fingerprint: str
    created_at: str


def read_calibration(path: Path) -> CalibrationParts:
    """Read the header and every table.

    Raises:
        CalibrationError: the file is missing or invalid; the message names the fault.
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
        null: tuple(
            _take(path, tensors, f"{null}.{layer}", _rows_of(null, facts))
            for layer in range(facts.num_layers)
        )
        for null in facts.nulls
    }
    observed = {
        null: tuple(
            _take_observed(path, tensors, f"{OBSERVED}.{null}.{layer}", facts.num_experts)
            for layer in range(facts.num_layers)
        )
        for null in facts.observed
    }
    contributions = _take_contributions(path, tensors, facts) if facts.contributions else None
    passages = _take_passages(path, tensors)
    if tensors:
        raise CalibrationError(
            f"calibration {path} holds {len(tensors)} tensors that its header doesn't name, such "
            f"as {min(tensors)!r}; {_REMEDY}"
        )
    return CalibrationParts(
        facts,
        tables,
        observed,
        contributions,
        passages,
        header.get("fingerprint", ""),
        header.get("created_at", ""),
    )


def _read_facts(path: Path, header: dict[str, str]) -> CalibrationFacts:
    if header.get("format") != FORMAT:
        raise CalibrationError(
            f"{path} is a safetensors file, but no calibration of bh-routing; {_REMEDY}"
        )
    if header.get("schema") not in _READABLE:
        raise CalibrationError(
            f"calibration {path} has schema {header.get('schema')!r}, this version reads "
            f"{', '.join(_READABLE)}; {_REMEDY}"
        )
    try:
        return CalibrationFacts.model_validate_json(header.get("facts", ""))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "facts"
        raise CalibrationError(
            f"calibration {path} has unreadable facts ({where}: {first['msg']}); {_REMEDY}"
        ) from error


def _take_contributions(
    path: Path, tensors: dict[str, Tensor], facts: CalibrationFacts
) -> Contributions:
    """Remove the tensors that describe slots from `tensors` and return them as Contributions."""
    scales: dict[Statistic, Tensor] = {}
    all_scores: dict[Statistic, ReferenceTable] = {}
    needed_scores: dict[tuple[Statistic, Definition], ReferenceTable] = {}
    cuts: dict[Definition, float] = {}
    shape_LE = (facts.num_layers, facts.num_experts)
    residual_norms_L = _take_scale(path, tensors, _RESIDUAL_NORMS, shape_LE[:1])
    for name in facts.contributions:
        if name == _RESIDUAL_NORMS:
            continue
        kind, *words = name.split(".")
        known = [word in (*get_args(Statistic), *get_args(Definition)) for word in words]
        if not all(known) or (kind, len(words)) not in _KINDS:
            raise CalibrationError(
                f"calibration {path} holds contributions of an unknown kind {name!r}; {_REMEDY}"
            )
        if kind == "cut":
            cuts[cast(Definition, words[0])] = float(_take_scale(path, tensors, name, ()))
            continue
        statistic = cast(Statistic, words[0])
        if kind == "scale":
            scales[statistic] = _take_scale(path, tensors, name, shape_LE)
        elif kind == "all":
            all_scores[statistic] = _take(path, tensors, f"{CONTRIBUTIONS}.{name}")
        else:
            table = _take(path, tensors, f"{CONTRIBUTIONS}.{name}")
            needed_scores[statistic, cast(Definition, words[1])] = table
    return Contributions(
        residual_norms_L=residual_norms_L,
        scales=scales,
        all_scores=all_scores,
        needed_scores=needed_scores,
        cuts=cuts,
    )


def _take_scale(
    path: Path, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> Tensor:
    scale = tensors.pop(f"{CONTRIBUTIONS}.{name}", torch.empty(0))
    if scale.shape != shape or scale.dtype != torch.float32:
        raise CalibrationError(
            f"{name!r} of calibration {path} must be float32 of shape {shape}, got "
            f"{scale.dtype} of shape {tuple(scale.shape)}; {_REMEDY}"
        )
    if not bool((scale.isfinite() & (scale >= 0)).all()):
        raise CalibrationError(
            f"{name!r} of calibration {path} must be finite and at least 0; {_REMEDY}"
        )
    return scale


def _take_observed(path: Path, tensors: dict[str, Tensor], name: str, num_experts: int) -> Tensor:
    """Remove a sample of scores from `tensors`, validate it and return it."""
    scores_TE = tensors.pop(name, torch.empty(0))
    is_shaped = scores_TE.ndim == 2 and scores_TE.shape[-1] == num_experts and len(scores_TE) > 0
    is_sound = scores_TE.dtype == torch.float32 and bool(scores_TE.isfinite().all())
    if not is_shaped or not is_sound:
        raise CalibrationError(
            f"{name!r} of calibration {path} must be finite float32 scores of shape "
            f"(T, {num_experts}), got {scores_TE.dtype} of shape {tuple(scores_TE.shape)}; "
            f"{_REMEDY}"
        )
    return scores_TE


def _take_passages(path: Path, tensors: dict[str, Tensor]) -> Tensor:
    """Remove the hashes of passages from `tensors` and return them; empty before schema 4."""
    passages = tensors.pop(PASSAGES, torch.empty(0, dtype=torch.int64))
    if passages.dtype != torch.int64 or passages.ndim != 1 or bool((passages.diff() <= 0).any()):
        raise CalibrationError(
            f"{PASSAGES!r} of calibration {path} must be ascending int64, got {passages.dtype} of "
            f"shape {tuple(passages.shape)}; {_REMEDY}"
        )
    return passages


def _rows_of(null: str, facts: CalibrationFacts) -> tuple[int, ...]:
    """Return the leading axes of a null's table, before the axis of scores."""
    return (facts.num_experts,) if null in NULLS and NULLS[null].by_expert else ()


def _take(
    path: Path, tensors: dict[str, Tensor], name: str, rows: tuple[int, ...] = ()
) -> ReferenceTable:
    """Remove a tensor from `tensors`, validate it and return it as a table."""
    if name not in tensors:
        raise CalibrationError(f"calibration {path} lacks the table {name!r}; {_REMEDY}")
    scores_N = tensors.pop(name)
    is_shaped = scores_N.ndim == len(rows) + 1 and scores_N.shape[:-1] == rows
    if scores_N.dtype != torch.float32 or not is_shaped or scores_N.numel() == 0:
        wanted = ", ".join([*map(str, rows), "N" if rows else "N,"])
        raise CalibrationError(
            f"table {name!r} of calibration {path} must be float32 of shape ({wanted}), got "
            f"{scores_N.dtype} of shape {tuple(scores_N.shape)}; {_REMEDY}"
        )
    if not bool(scores_N.isfinite().all()):
        raise CalibrationError(
            f"table {name!r} of calibration {path} has NaN or infinite scores; {_REMEDY}"
        )
    if bool((scores_N.diff() < 0).any()):
        raise CalibrationError(f"table {name!r} of calibration {path} isn't sorted; {_REMEDY}")
    return ReferenceTable(scores_N)
