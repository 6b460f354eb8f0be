"""A frozen calibration: reference tables of one model with their provenance, saved in one file.

The file is safetensors: tensors `<null>.<layer>`, `observed.<null>.<layer>`, `contributions.*` and
`passages`, and JSON facts in its header. Nothing in it is executable. Axes: N reference scores.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from bh_routing.errors import CalibrationError
from bh_routing.nulls.base import ReferenceTable
from bh_routing.nulls.catalog import NULLS
from bh_routing.nulls.contributions import OF_SLOTS, Contributions, is_of_null, remedy
from bh_routing.nulls.cut_offs import DRAWS_ON_FIRST_LINE, MIN_DOCUMENTS, MIN_TOKENS
from bh_routing.nulls.reservoir import row_capacity
from bh_routing.results.calibration_file import (
    CONTRIBUTIONS,
    FORMAT,
    OBSERVED,
    PASSAGES,
    REMEDY,
    SCHEMA,
    CalibrationFacts,
    read_calibration,
)
from bh_routing.results.files import unwritable, write_atomically


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """Reference tables for every layer of one model, with their provenance."""

    tables: Mapping[str, tuple[ReferenceTable, ...]]
    """Null -> one table per layer."""
    model_fingerprint: str
    num_layers: int
    """Layers with a router."""
    num_experts: int
    model_top_k: int
    num_tokens: int
    """Distinct tokens of calibration text, each counted once."""
    num_documents: int
    text_sha256: str
    seed: int
    table_capacity: int
    """Maximum number of scores per table."""
    contributions: Contributions | None = None
    """Statistics of slots; None unless "needed" was calibrated."""
    observed: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Null -> each layer's scores of a few calibration tokens, float32 (T, E), which charts
    compare with the reference sample. No rule uses them."""
    passages: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Hashes of passages of the calibration text, ascending, int64; empty if unknown. Evaluation
    text is checked against them."""
    router_fingerprint: str = ""
    """Hash of the routers' weights; empty if unknown. Programs other than transformers, which can't
    compute `model_fingerprint`, recognise the model by it."""
    created_at: str = ""
    """UTC, ISO 8601; not part of the fingerprint."""

    def __post_init__(self) -> None:
        """Raise CalibrationError unless every null has one table per layer."""
        for null, tables in self.tables.items():
            if len(tables) != self.num_layers:
                raise CalibrationError(
                    f"calibration has {len(tables)} tables of null {null!r} for {self.num_layers} "
                    f"layers; {REMEDY}"
                )

    def table(self, null: str, layer: int) -> ReferenceTable:
        """Return the reference table of a null in a layer.

        Raises:
            CalibrationError: the calibration doesn't hold this null or layer.
        """
        tables = self._tables_of(null)
        if not 0 <= layer < len(tables):
            raise CalibrationError(
                f"calibration covers layers 0 to {len(tables) - 1}, layer {layer} was asked for; "
                f"{REMEDY}"
            )
        return tables[layer]

    def references(
        self, null: str, layer: int
    ) -> tuple[ReferenceTable | None, Contributions | None]:
        """Return what a layer's rules of this null read: its table, or the observed slots.

        The slots are those of all layers, on the CPU; None if none were observed.

        Raises:
            CalibrationError: the calibration doesn't hold this null or layer.
        """
        if null not in OF_SLOTS:
            return self.table(null, layer), None
        slots = self.contributions
        return None, slots and slots.to(torch.device("cpu"))

    def resolution(self, null: str) -> float:
        """Return the smallest alpha that every table of this null can resolve: 20 * E / n."""
        return DRAWS_ON_FIRST_LINE * self.num_experts / self.table_size(null)

    def table_size(self, null: str) -> int:
        """Return the size of the smallest table of this null.

        Raises:
            CalibrationError: the calibration doesn't hold this null.
        """
        sizes = self.contributions.sizes(null) if self.contributions is not None else []
        return min(sizes or [len(table) for table in self._tables_of(null)])

    @property
    def nulls(self) -> tuple[str, ...]:
        """Names of all calibrated nulls, including "needed"."""
        needed = [
            null
            for null in OF_SLOTS
            if self.contributions is not None and self.contributions.sizes(null)
        ]
        return (*sorted(self.tables), *needed)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over tables and facts, in hex; the date is excluded."""
        digest = hashlib.sha256()
        # Without defaults: a file of schema 2, which lacks these fields, keeps its fingerprint.
        facts = self._facts().model_dump(mode="json", exclude_defaults=True)
        digest.update(json.dumps(facts, sort_keys=True).encode())
        for null in sorted(self.tables):
            for table in self.tables[null]:
                digest.update(table.sorted_scores_N.cpu().numpy().astype("<f4").tobytes())
        for name, tensor in sorted(self._contribution_tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().astype("<f4").tobytes())
        for name, tensor in sorted(self._observed_tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().astype("<f4").tobytes())
        digest.update(self.passages.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def table_fingerprints(self) -> Mapping[str, str]:
        """Null -> SHA-256 in hex over the tables that its rules read, and no others."""
        return {null: self._table_fingerprint(null) for null in self.nulls}

    def _table_fingerprint(self, null: str) -> str:
        digest = hashlib.sha256()
        if null in OF_SLOTS:
            for name, tensor in sorted(self._contribution_tensors().items()):
                if is_of_null(name, null):
                    digest.update(name.encode())
                    digest.update(tensor.cpu().numpy().astype("<f4").tobytes())
        for table in self.tables.get(null, ()):
            digest.update(table.sorted_scores_N.cpu().numpy().astype("<f4").tobytes())
        return digest.hexdigest()

    def check(
        self,
        *,
        null: str,
        alpha: float | None,
        num_layers: int,
        num_experts: int,
        model_top_k: int,
        model_fingerprint: str | None = None,
        router_fingerprint: str | None = None,
    ) -> None:
        """Check that the calibration is of this model and its tables resolve alpha.

        Args:
            null: the null that the rule needs.
            alpha: the rule's target, `Rule.smallest_alpha(num_experts)`; None if it has none.
            num_layers: the model's layers with a router.
            num_experts: the model's experts per layer.
            model_top_k: the model's own experts per token.
            model_fingerprint: the model's fingerprint; None: it isn't compared.
            router_fingerprint: that of its routers; None: it isn't compared.
        Raises:
            CalibrationError: either fails; the message gives value, requirement and remedy.
        """
        self.table_size(null)
        again = f"run: bh_routing.calibrate(model, tokenizer, texts, nulls={list(self.nulls)})"
        for what, ours, theirs in (
            ("layers", self.num_layers, num_layers),
            ("experts per layer", self.num_experts, num_experts),
            ("experts per token", self.model_top_k, model_top_k),
        ):
            if ours != theirs:
                raise CalibrationError(
                    f"calibration covers {ours} {what}, the model has {theirs}; {again}"
                )
        if model_fingerprint is not None and model_fingerprint != self.model_fingerprint:
            raise CalibrationError(
                f"calibration was made for model {self.model_fingerprint[:12]}, this one is "
                f"{model_fingerprint[:12]}: same shape, but other weights or settings, or a "
                f"calibration of an older version; {again}"
            )
        if router_fingerprint is not None and router_fingerprint != self.router_fingerprint:
            made_for = self.router_fingerprint[:12] or "unknown to an older version"
            raise CalibrationError(
                f"calibration was made for routers {made_for}, this model's are "
                f"{router_fingerprint[:12]}: another checkpoint of the same shape; {again}"
            )
        self._check_reach(null, alpha)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the calibration to one safetensors file, atomically.

        Raises:
            ResultsError: the disk is full, or the file isn't writable.
        """
        tensors = {
            f"{null}.{layer}": table.sorted_scores_N.cpu().contiguous()
            for null, tables in self.tables.items()
            for layer, table in enumerate(tables)
        }
        tensors |= {
            f"{CONTRIBUTIONS}.{name}": tensor.cpu().contiguous()
            for name, tensor in self._contribution_tensors().items()
        }
        tensors |= self._observed_tensors()
        tensors |= {PASSAGES: self.passages} if len(self.passages) else {}
        header = {
            "format": FORMAT,
            "schema": str(SCHEMA),
            "facts": self._facts().model_dump_json(),
            "fingerprint": self.fingerprint,
            "created_at": self.created_at,
        }
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(target.parent, error) from error
        return write_atomically(target, serialise(tensors, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read and validate a calibration.

        Raises:
            CalibrationError: the file is missing, damaged, no calibration, or of another schema.
        """
        file = read_calibration(Path(path))
        fields: dict[str, Any] = file.facts.model_dump(
            exclude={"nulls", "contributions", "observed"}
        )
        loaded = cls(
            tables={
                null: tuple(ReferenceTable(torch.from_numpy(table)) for table in layers)
                for null, layers in file.tables.items()
            },
            observed={
                null: tuple(map(torch.from_numpy, layers)) for null, layers in file.observed.items()
            },
            passages=torch.from_numpy(file.passages),
            contributions=Contributions.of_arrays(file.contributions)
            if file.contributions
            else None,
            created_at=file.created_at,
            **fields,
        )
        if loaded.fingerprint != file.fingerprint:
            raise CalibrationError(
                f"calibration {path} was changed after it was written: its contents don't match "
                f"its fingerprint; {REMEDY}"
            )
        return loaded

    def to(self, device: torch.device) -> Calibration:
        """Return the same calibration with its tables on `device`."""
        tables = {n: tuple(table.to(device) for table in ts) for n, ts in self.tables.items()}
        return replace(
            self,
            tables=tables,
            contributions=self.contributions and self.contributions.to(device),
        )

    def extended_by(self, other: Calibration) -> Calibration:
        """Return this calibration plus the tables that only `other` has.

        Raises:
            CalibrationError: the two differ in model, text, seed or table capacity.
        """
        for name in ("model_fingerprint", "text_sha256", "num_tokens", "seed", "table_capacity"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise CalibrationError(
                    f"calibrations of different {name} can't be joined: {ours} and {theirs}; "
                    "calibrate all nulls together"
                )
        contributions = self.contributions or other.contributions
        if self.contributions is not None and other.contributions is not None:
            contributions = self.contributions.extended_by(other.contributions)
        return replace(
            self,
            tables={**other.tables, **self.tables},
            observed={**other.observed, **self.observed},
            contributions=contributions,
            router_fingerprint=self.router_fingerprint or other.router_fingerprint,
        )

    def _contribution_tensors(self) -> dict[str, Tensor]:
        return {} if self.contributions is None else self.contributions.tensors()

    def _observed_tensors(self) -> dict[str, Tensor]:
        return {
            f"{OBSERVED}.{null}.{layer}": scores_TE.cpu().contiguous()
            for null, layers in self.observed.items()
            for layer, scores_TE in enumerate(layers)
        }

    def _tables_of(self, null: str) -> tuple[ReferenceTable, ...]:
        if null not in self.tables:
            advice = remedy(null) if null in OF_SLOTS else REMEDY
            raise CalibrationError(
                f"calibration holds no table of null {null!r}, only of: "
                f"{', '.join(self.nulls) or 'none'}; {advice}"
            )
        return self.tables[null]

    def check_text(self) -> None:
        """Raise CalibrationError if the calibration text is too short for any rule."""
        for what, have, need, advice in (
            ("distinct tokens", self.num_tokens, MIN_TOKENS, "longer text, or more tokens of it"),
            ("documents", self.num_documents, MIN_DOCUMENTS, "text of more documents"),
        ):
            if have < need:
                raise CalibrationError(
                    f"calibration was made from {have} {what}, at least {need} are needed; "
                    f"calibrate on {advice}"
                )

    def _check_reach(self, null: str, alpha: float | None) -> None:
        self.check_text()
        size = self.table_size(null)
        if alpha is None:
            return
        # The subtrahend undoes rounding: 20 * 64 / 0.01 must require 128,000 and no more.
        needed = ceil(DRAWS_ON_FIRST_LINE * self.num_experts / alpha - 1e-6)
        if size < needed:
            reach, remedy = _rounded_up(self.resolution(null)), self._way_to_reach(null, needed)
            advice = f"use alpha >= {reach:g}, or {remedy}" if reach < 1 else remedy
            raise CalibrationError(
                f"alpha {alpha:g} is out of the calibration's reach: its tables of null {null!r} "
                f"hold {size} scores and {needed} are needed; {advice}"
            )

    def _way_to_reach(self, null: str, needed: int) -> str:
        """Return advice for obtaining a table of `needed` scores, if that is possible."""
        size = self.table_size(null)
        if null in NULLS and NULLS[null].by_expert:
            # A token gives at most one score per expert, and none to the experts of its top-k.
            tokens = ceil(1.05 * needed * self.num_tokens / size)
            if tokens <= row_capacity(self.num_experts):
                return (
                    f"run: bh_routing.calibrate(model, tokenizer, texts, nulls=[{null!r}], "
                    f"max_tokens={tokens})"
                )
            return "another null: tables by expert can't be that large"
        if size >= self.table_capacity:
            return "calibrate with larger tables"
        return "calibrate on more tokens of text"

    def _facts(self) -> CalibrationFacts:
        return CalibrationFacts(
            nulls=sorted(self.tables),
            contributions=sorted(self._contribution_tensors()),
            model_fingerprint=self.model_fingerprint,
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            model_top_k=self.model_top_k,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            text_sha256=self.text_sha256,
            seed=self.seed,
            table_capacity=self.table_capacity,
            observed=sorted(self.observed),
            router_fingerprint=self.router_fingerprint,
        )


def _rounded_up(alpha: float) -> float:
    """Round up to two significant digits, so that the advised alpha is large enough."""
    unit = 10.0 ** (floor(log10(alpha)) - 1)
    return ceil(alpha / unit - 1e-9) * unit
