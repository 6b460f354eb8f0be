"""What makes two runs comparable, and what makes two experiments the same one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from bh_routing.experiments.chained_lines import digest
from bh_routing.experiments.spec import NamedRule, Prompt
from bh_routing.nulls.calibration import Calibration
from bh_routing.records import SCHEMA_VERSION, journal_seed
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import rule_to_config

_KEY_LENGTH: Final = 16
_LABELS: Final = {
    "schema_version": "schema",
    "model": "model (--model)",
    "dtype": "dtype (--no-fp16)",
    "device_type": "device (--device)",
    "max_tokens": "--max-tokens",
    "chat_template": "chat template (--chat-template)",
    "calibration": "calibration (--calibration, --calibration-text)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """All experiments of a folder share this; with another one they must not be mixed."""

    schema_version: int = SCHEMA_VERSION
    model: str
    """Name of the model, for messages."""
    model_fingerprint: str
    dtype: str
    device_type: str
    max_tokens: int
    chat_template: str | None = None
    """Hash of the template that prompts are written into; None: they are raw."""
    calibration: str | None = None
    """Fingerprint; None while no configuration has needed one."""

    def journal_seed(self) -> str:
        """What the journal's checksums build on: all but the name and the calibration."""
        return journal_seed(asdict(self))

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Name what differs from the identity stored in a folder, value by value."""
        own = asdict(self)
        found = [
            f"{label}: {_show(other.get(name))} there, {_show(own[name])} now"
            for name, label in _LABELS.items()
            if name not in ("model", "calibration") and own[name] != other.get(name)
        ]
        # A dtype changes the weights that are hashed: name the cause, not its consequence.
        same_weights = self.model_fingerprint == other.get("model_fingerprint")
        if not same_weights and not (
            self.dtype != other.get("dtype") and self.model == other.get("model")
        ):
            there = f"{other.get('model')} ({_show(other.get('model_fingerprint'))})"
            now = f"{self.model} ({_show(self.model_fingerprint)})"
            found.insert(0, f"{_LABELS['model']}: {there} there, {now} now")
        stored = other.get("calibration")
        if stored and self.calibration and stored != self.calibration:
            found.append(
                f"{_LABELS['calibration']}: {_show(stored)} there, {_show(self.calibration)} now"
            )
        return found


def rule_key(rule: Rule, calibration: Calibration | None) -> str:
    """Fingerprint of what a configuration does: its rule, and the tables that the rule reads."""
    null = rule.required_null
    tables = None if null is None or calibration is None else calibration.tables_fingerprint(null)
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


def _show(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}…" if len(text) == 64 else text  # a SHA-256
