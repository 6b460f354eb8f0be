"""Identity, which decides whether runs are comparable, and provenance of results."""

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
from bh_routing.experiments.configurations import NamedRule
from bh_routing.experiments.specs import Prompt
from bh_routing.models.routers import describe_model, model_settings, tokenizer_fingerprint
from bh_routing.nulls.calibration import Calibration
from bh_routing.results.journal import digest
from bh_routing.results.records import SCHEMA_VERSION, journal_seed
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import rule_to_config

_GIT_TIMEOUT_SEC = 5.0


def collect_provenance(seed: int) -> dict[str, Any]:
    """Return versions, machine, seed, revision and start time, for run.json."""
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
    """Return the versions on which greedy generation may depend."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"bh_routing": bh_routing.__version__, **versions}


def git_revision(folder: Path) -> str | None:
    """Return the git revision of `folder`, with `-dirty` if changed; None if untracked."""
    # A virtual environment inside another project's clone is untracked there.
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
    """Return the device's product name; for an unknown CPU its architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # only Linux has this file, with a name on some architectures
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory use so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_KEY_LENGTH: Final = 16
_MOST_SETTINGS: Final = 3
"""Settings that a message names; of more it gives the number."""
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
    """Properties common to all results of a folder; other results must not be mixed in."""

    schema_version: int = SCHEMA_VERSION
    model: str
    """Name, for messages."""
    model_fingerprint: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Content of config.json and generation_config.json, so that messages can name differences."""
    tokenizer: str = ""
    """Fingerprint."""
    dtype: str
    device_type: str
    device_name: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of libraries on which generated text and losses depend."""
    max_tokens: int | None = None
    """Per experiment; None without generation."""
    chat_template: str | None = None
    """Hash of the template that formats prompts; None: prompts are raw."""
    tables: Mapping[str, str] = field(default_factory=dict)
    """Null -> fingerprint of its tables; a folder may gain nulls, but no fingerprint may change."""

    def journal_seed(self) -> str:
        """Return the seed of the journal's checksums, which leaves out name and calibration."""
        return journal_seed(asdict(self))

    def of_scores(self) -> dict[str, Any]:
        """Return the fields on which scores of text depend; tables are part of each score's key."""
        return asdict(replace(self, max_tokens=None, chat_template=None, tables={}))

    def differences(self, stored: object) -> list[str]:
        """Return the differences from the identity stored in a folder, value by value."""
        if not isinstance(stored, Mapping) or "versions" not in stored:
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
        """Return causes, not consequences: a different dtype changes the weights' hash too."""
        is_same = self.model_fingerprint == other.model_fingerprint
        changed = list(_changed(self.settings, other.settings))
        are_few = len(changed) <= _MOST_SETTINGS  # a different model differs in many
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
    name: str, model: Any, tokenizer: Any, *, max_tokens: int | None = None
) -> RunIdentity:
    """Return the identity of results made with this model on this machine, without a calibration.

    Args:
        name: the model's name, for messages.
        model, tokenizer: the loaded model.
        max_tokens: maximum number of tokens per experiment; None without generation.
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
    )


def rule_key(rule: Rule, calibration: Calibration | None) -> str:
    """Return the fingerprint of a rule and the calibration tables that it reads."""
    known = {} if calibration is None else calibration.table_fingerprints
    tables = known.get(rule.required_null or "")
    return digest([rule_to_config(rule), tables])[:_KEY_LENGTH]


def experiment_key(
    named_rule: NamedRule, prompt: Prompt, calibration: Calibration | None = None
) -> str:
    """Return the fingerprint of everything on which an experiment's row depends within a run.

    A configuration's description isn't in the row, so rewording it doesn't invalidate the row.
    """
    return digest(
        {
            "config_name": named_rule.name,
            "rule": rule_key(named_rule.rule, calibration),
            "prompt": prompt.model_dump(),
        }
    )[:_KEY_LENGTH]


def _changed(now: Any, there: Any, path: str = "") -> Iterator[str]:
    """Yield path and values of each differing entry in nested settings."""
    if isinstance(now, Mapping) and isinstance(there, Mapping):
        for name in sorted({*now, *there}):
            yield from _changed(now.get(name), there.get(name), f"{path}.{name}" if path else name)
    elif now != there:
        yield f"{path}: {there} there, {now} now"


def _show(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}…" if len(text) == 64 else text  # a SHA-256
