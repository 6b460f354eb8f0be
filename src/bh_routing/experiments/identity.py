"""Identity and provenance: which runs are comparable, and where a result came from."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import TypeAdapter, ValidationError

import bh_routing
from bh_routing.experiments.specs import NamedRule, Prompt
from bh_routing.models.routers import describe_model, model_settings, tokenizer_fingerprint
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.journal import digest
from bh_routing.results.records import SCHEMA_VERSION, journal_seed
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import rule_to_config

_GIT_TIMEOUT_SEC = 5.0


def collect_provenance(seed: int) -> dict[str, Any]:
    """Return versions, machine, seed, revision and start, as in run.json."""
    return {
        **library_versions(),
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "git_revision": git_revision(Path(bh_routing.__file__).parent),
        "seed": seed,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def library_versions() -> dict[str, str]:
    """Return the versions that a greedy text may depend on."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"bh_routing": bh_routing.__version__, **versions}


def git_revision(folder: Path) -> str | None:
    """Return the revision that tracks `folder`, with `-dirty` if changed; None outside git."""
    # A virtual environment inside somebody else's clone isn't tracked by it.
    if not _git(folder, "ls-files", "__init__.py"):
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SEC,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Return the product's name; of a CPU whose name isn't known the architecture's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # Linux alone has this file, and not on every architecture the name
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the highest memory use so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_KEY_LENGTH: Final = 16
_MOST_SETTINGS: Final = 3
"""Settings that a sentence names; of more it says how many."""
_LABELS: Final = {
    "schema_version": "schema",
    "tokenizer": "tokenizer",
    "dtype": "dtype (--no-fp16)",
    "device_type": "device (--device)",
    "device_name": "device's product",
    "max_tokens": "--max-tokens",
    "chat_template": "chat template (--chat-template)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """All results of a folder share this; with another one they must not be mixed."""

    schema_version: int = SCHEMA_VERSION
    model: str
    """Name of the model, for messages."""
    model_fingerprint: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What config.json and generation_config.json say, so that a message can name what differs."""
    tokenizer: str = ""
    """Fingerprint."""
    dtype: str
    device_type: str
    device_name: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Libraries that texts and losses depend on."""
    max_tokens: int | None = None
    """Of an experiment; None where nothing is generated."""
    chat_template: str | None = None
    """Hash of the template that prompts are written into; None: they are raw."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Null -> fingerprint of its tables; a folder may get further ones, but never others."""

    def journal_seed(self) -> str:
        """What the journal's checksums build on: all but the name and the calibration."""
        return journal_seed(asdict(self))

    def of_scores(self) -> dict[str, Any]:
        """Return what scores of text depend on; the tables are part of each score's key."""
        return asdict(replace(self, max_tokens=None, chat_template=None, tables={}))

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Name what differs from the identity stored in a folder, value by value."""
        if "versions" not in stored:
            return ["an older version of bh-routing noted there less of what results depend on"]
        try:
            other = _IDENTITY.validate_python(stored)
        except ValidationError:
            return ["its identity can't be read; it was edited"]
        pairs = [(label, getattr(other, n), getattr(self, n)) for n, label in _LABELS.items()]
        pairs += [(name, other.versions.get(name), now) for name, now in self.versions.items()]
        pairs += [
            (f"calibration of null {null!r} (--calibration, --calibration-text)", there, now)
            for null, now in self.tables.items()
            if (there := other.tables.get(null)) is not None
        ]
        found = [
            f"{label}: {_show(there)} there, {_show(now)} now"
            for label, there, now in pairs
            if there != now
        ]
        return [*self._model_differences(other), *found]

    def _model_differences(self, other: RunIdentity) -> list[str]:
        """Name the cause, not its consequences: the dtype, too, changes the weights' hash."""
        is_same = self.model_fingerprint == other.model_fingerprint
        changed = list(_changed(self.settings, other.settings))
        are_few = len(changed) <= _MOST_SETTINGS  # of another model altogether many differ
        if changed and (is_same or are_few or self.model == other.model):
            shown = "; ".join(changed[:_MOST_SETTINGS])
            more = len(changed) - _MOST_SETTINGS
            return [f"model's settings: {shown}{f' and {more} more' if more > 0 else ''}"]
        if is_same or (self.dtype != other.dtype and self.model == other.model):
            return []
        there = f"{other.model} ({_show(other.model_fingerprint)})"
        now = f"{self.model} ({_show(self.model_fingerprint)})"
        return [f"model (--model): {there} there, {now} now"]


_IDENTITY: Final = TypeAdapter(RunIdentity)


def identify(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    calibration: Calibration | None = None,
) -> RunIdentity:
    """Say what results of a model depend on here and now.

    Args:
        name: the model's, for messages.
        model, tokenizer: what results are made with.
        max_tokens: tokens of an experiment; None if none is generated.
        calibration: None while nothing has needed one.
    """
    facts, template = describe_model(model), getattr(tokenizer, "chat_template", None)
    return RunIdentity(
        model=name,
        model_fingerprint=facts.fingerprint,
        settings=model_settings(model),
        tokenizer=tokenizer_fingerprint(tokenizer),
        dtype=facts.dtype,
        device_type=facts.device,
        device_name=device_name(model.device),
        versions=library_versions(),
        max_tokens=max_tokens,
        chat_template=digest(template) if template else None,
        tables={} if calibration is None else calibration.table_fingerprints,
    )


def rule_key(rule: Rule, calibration: Calibration | None) -> str:
    """Fingerprint of what a configuration does: its rule, and the tables that the rule reads."""
    known = {} if calibration is None else calibration.table_fingerprints
    tables = known.get(rule.required_null or "")
    return digest([rule_to_config(rule), tables])[:_KEY_LENGTH]


def experiment_key(
    named_rule: NamedRule, prompt: Prompt, calibration: Calibration | None = None
) -> str:
    """Fingerprint of one experiment within a run: everything its row depends on.

    The description of a configuration isn't in the row, so a new wording reuses it.
    """
    return digest(
        {
            "config_name": named_rule.name,
            "rule": rule_key(named_rule.rule, calibration),
            "prompt": prompt.model_dump(),
        }
    )[:_KEY_LENGTH]


def _changed(now: Any, there: Any, path: str = "") -> Iterator[str]:
    """Yield each setting that differs, by its place in the nested settings."""
    if isinstance(now, Mapping) and isinstance(there, Mapping):
        for name in sorted({*now, *there}):
            yield from _changed(now.get(name), there.get(name), f"{path}.{name}" if path else name)
    elif now != there:
        yield f"{path}: {there} there, {now} now"


def _show(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}…" if len(text) == 64 else text  # a SHA-256
