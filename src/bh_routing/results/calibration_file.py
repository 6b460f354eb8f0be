"""The layout of a calibration file, and a reader that validates all of it, without torch.

Axes: L layers, E experts, T tokens, N reference scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open

from bh_routing.errors import CalibrationError

Statistic = Literal["contribution", "weight", "sensitivity", "layer_sensitivity"]
"""contribution: weight x mean output norm of the expert / mean residual norm of the layer.
weight: the routing weight alone. sensitivity: weight x root mean square of the loss's derivative
with respect to the weight, an estimate of the increase in loss when the slot is dropped.
layer_sensitivity: weight x mean output norm of the expert, scaled in each layer to the layer's mean
sensitivity: fewer numbers to estimate from gradients, one per layer."""

Definition = Literal["norm", "loss"]
"""norm: the slot's true contribution, weight x its own output norm / its token's own residual
norm, was above the median over all layers' slots. loss: |dL/dw x w|, the first-order change of the
text's loss if the slot is dropped, was above its median."""

NEEDED: Final[Mapping[str, str]] = {"norm": "needed", "loss": "needed_by_loss"}
"""Definition -> its name in a calibration."""
STEPS: Final = "needed_steps"
"""Name in a calibration of the pairs of expert and decode step that mattered."""
OF_SLOTS: Final = (*NEEDED.values(), STEPS)
"""Names in a calibration that describe observed slots."""
STEP_SIZES: Final = (2, 4, 8, 16, 32, 64)
"""Tokens of the calibrated decode steps."""
NEEDED_STEPS: Final = f"{STEPS}.sensitivity"
ALL_STEPS: Final = "all_steps.sensitivity"
"""Tensors with the roots of the pairs' Fisher masses, a row per size of step."""

FORMAT: Final = "bh_routing.calibration"
SCHEMA: Final = 5
_READABLE: Final = ("2", "3", "4", str(SCHEMA))
"""Schema 4 lacks the routers' fingerprint, 3 also passages, 2 also observed scores."""
OBSERVED: Final = "observed"
CONTRIBUTIONS: Final = "contributions"
PASSAGES: Final = "passages"
RESIDUAL_NORMS: Final = "residual_norms"
_KINDS: Final = {"residual_norms": 0, "scale": 1, "all": 1, "needed": 2, "cut": 1}
_KINDS_OF_STEPS: Final = (NEEDED_STEPS, ALL_STEPS)
"""Kind of a tensor that describes slots -> number of words after it in the tensor's name."""
_WORDS: Final = (*get_args(Statistic), *get_args(Definition))
BY_EXPERT: Final = ("per_expert",)
"""Null distributions whose tables have a row per expert."""
REMEDY: Final = "run: bh_routing.calibrate(model, tokenizer, texts)"
"""The command line replaces the call by its command."""

Array = NDArray[Any]


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
    router_fingerprint: str = ""
    """Empty before schema 5, and for routers that are no linear layer."""


class CalibrationArrays(NamedTuple):
    """Contents of a file, validated except for the fingerprint; float32 unless noted."""

    facts: CalibrationFacts
    tables: dict[str, tuple[Array, ...]]
    """Null -> ascending reference scores of each layer, (N,), or (E, N) with a row per expert."""
    observed: dict[str, tuple[Array, ...]]
    """Null -> observed scores of each layer, (T, E)."""
    contributions: dict[str, Array]
    """Name of a tensor that describes slots -> its values; empty if none were observed."""
    passages: Array
    """Ascending hashes, int64; empty before schema 4."""
    fingerprint: str
    created_at: str


def read_calibration(path: Path) -> CalibrationArrays:
    """Read the header and every table.

    Raises:
        CalibrationError: the file is missing or invalid; the message names the fault.
    """
    if not path.is_file():
        raise CalibrationError(f"calibration {path} does not exist or is no file; {REMEDY}")
    try:
        with safe_open(path, framework="numpy") as file:
            header: dict[str, str] = file.metadata() or {}
            facts = _read_facts(path, header)
            arrays = dict(_read_arrays(path, file))
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path} is no calibration or is damaged ({error}); {REMEDY}"
        ) from error
    layers, rows = range(facts.num_layers), (facts.num_experts,)
    tables = {
        null: tuple(
            # The axes before that of the scores.
            _take_table(path, arrays, f"{null}.{layer}", rows if null in BY_EXPERT else ())
            for layer in layers
        )
        for null in facts.nulls
    }
    observed = {
        null: tuple(
            _take_observed(path, arrays, f"{OBSERVED}.{null}.{layer}", facts.num_experts)
            for layer in layers
        )
        for null in facts.observed
    }
    if facts.contributions and RESIDUAL_NORMS not in facts.contributions:
        raise CalibrationError(f"calibration {path} lacks {RESIDUAL_NORMS!r}; {REMEDY}")
    contributions = {n: _take_contribution(path, arrays, n, facts) for n in facts.contributions}
    passages = arrays.pop(PASSAGES, np.empty(0, np.int64))
    if passages.ndim != 1 or (np.diff(passages) <= 0).any():
        raise _invalid(path, PASSAGES, f"ascending int64, got shape {passages.shape}")
    if arrays:
        raise CalibrationError(
            f"calibration {path} holds {len(arrays)} tensors that its header doesn't name, such "
            f"as {min(arrays)!r}; {REMEDY}"
        )
    return CalibrationArrays(
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
            f"{path} is a safetensors file, but no calibration of bh-routing; {REMEDY}"
        )
    if header.get("schema") not in _READABLE:
        raise CalibrationError(
            f"calibration {path} has schema {header.get('schema')!r}, this version reads "
            f"{', '.join(_READABLE)}; {REMEDY}"
        )
    try:
        return CalibrationFacts.model_validate_json(header.get("facts", ""))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "facts"
        raise CalibrationError(
            f"calibration {path} has unreadable facts ({where}: {first['msg']}); {REMEDY}"
        ) from error


def _read_arrays(path: Path, file: Any) -> Iterator[tuple[str, Array]]:
    """Yield every tensor, whose dtype is checked first: numpy can't hold each one."""
    for name in file.keys():  # noqa: SIM118
        wanted, label = ("I64", "ascending int64") if name == PASSAGES else ("F32", "float32")
        if (dtype := file.get_slice(name).get_dtype()) != wanted:
            raise _invalid(path, name, f"{label}, got {dtype}")
        values: Array = file.get_tensor(name)
        if not np.isfinite(values).all():
            raise _invalid(path, name, "finite, but has NaN or infinite values")
        yield name, values


def _take_table(
    path: Path, arrays: dict[str, Array], name: str, rows: tuple[int, ...] = ()
) -> Array:
    """Remove an array from `arrays`, validate it as a table of reference scores, and return it."""
    scores_N = _take(path, arrays, name)
    is_shaped = scores_N.ndim == len(rows) + 1 and scores_N.shape[:-1] == rows
    if not is_shaped or scores_N.size == 0:
        wanted = ", ".join([*map(str, rows), "N" if rows else "N,"])
        raise _invalid(path, name, f"of shape ({wanted}), got {scores_N.shape}")
    if (np.diff(scores_N) < 0).any():
        raise _invalid(path, name, "sorted, but isn't")
    return scores_N


def _take_observed(path: Path, arrays: dict[str, Array], name: str, num_experts: int) -> Array:
    scores_TE = _take(path, arrays, name)
    if scores_TE.ndim != 2 or scores_TE.shape[-1] != num_experts or len(scores_TE) == 0:
        raise _invalid(path, name, f"of shape (T, {num_experts}), got {scores_TE.shape}")
    return scores_TE


def _take_contribution(
    path: Path, arrays: dict[str, Array], name: str, facts: CalibrationFacts
) -> Array:
    if name in _KINDS_OF_STEPS:
        return _take_table(path, arrays, f"{CONTRIBUTIONS}.{name}", (len(STEP_SIZES),))
    kind, *words = name.split(".")
    if _KINDS.get(kind) != len(words) or not set(words) <= set(_WORDS):
        raise CalibrationError(
            f"calibration {path} holds contributions of an unknown kind {name!r}; {REMEDY}"
        )
    if kind in ("all", "needed"):
        return _take_table(path, arrays, f"{CONTRIBUTIONS}.{name}")
    values = _take(path, arrays, f"{CONTRIBUTIONS}.{name}")
    shape_LE = (facts.num_layers, facts.num_experts)
    shape = {RESIDUAL_NORMS: shape_LE[:1], "scale": shape_LE, "cut": ()}[kind]
    if values.shape != shape or (values < 0).any():
        raise _invalid(path, name, f"at least 0 and of shape {shape}, got shape {values.shape}")
    return values


def _take(path: Path, arrays: dict[str, Array], name: str) -> Array:
    if name not in arrays:
        raise CalibrationError(f"calibration {path} lacks the table {name!r}; {REMEDY}")
    return arrays.pop(name)


def _invalid(path: Path, name: str, wanted: str) -> CalibrationError:
    return CalibrationError(f"{name!r} of calibration {path} must be {wanted}; {REMEDY}")
