"""What makes two runs comparable, and what makes two experiments the same one.

A folder holds results of one model on one kind of device under one set of library versions, since
each of these can change a greedy text, and the device every time. The batch size is no part of it:
texts are generated one by one, and in scoring it moves only the last digits, for a rule and the
model's own top-k alike; run.json notes it for each session.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from bh_routing.experiments.chained_lines import digest
from bh_routing.experiments.provenance import device_name, library_versions
from bh_routing.experiments.spec import NamedRule, Prompt
from bh_routing.models.discovery import (
    describe_model,
    model_settings,
    tokenizer_fingerprint,
)
from bh_routing.nulls.calibration import Calibration
from bh_routing.records import SCHEMA_VERSION, journal_seed
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import rule_to_config

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
