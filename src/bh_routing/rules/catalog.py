"""Catalog of rules by name, and conversion from and to plain dictionaries, as in YAML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any, Final

from bh_routing.errors import InputError, unknown_name
from bh_routing.results.records import json_digest
from bh_routing.rules.base import Rule
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.contribution import ContributionThreshold, OracleContribution
from bh_routing.rules.drop import BenjaminiHochbergDrop
from bh_routing.rules.fixed import PerLayerTopK, RandomK, TopK
from bh_routing.rules.higher_criticism import HigherCriticism
from bh_routing.rules.mass import Entropy, FloorThreshold, MinP, Threshold, TopP
from bh_routing.rules.step import ExpertBudget, FisherMass, OpportunisticActivation

_ALL: Final[tuple[type[Rule], ...]] = (
    TopK,
    BenjaminiHochberg,
    BenjaminiHochbergDrop,
    ContributionThreshold,
    OracleContribution,
    PerLayerTopK,
    TopP,
    MinP,
    FloorThreshold,
    Threshold,
    Entropy,
    HigherCriticism,
    FisherMass,
    OpportunisticActivation,
    ExpertBudget,
    RandomK,
)

RULES: Final[Mapping[str, type[Rule]]] = MappingProxyType({rule.method: rule for rule in _ALL})

# Names in users' own configurations; our output always has the catalog's names.
_ALIASES: Final = {"topk": "top_k"}

_NAME_LENGTH: Final = 64

# Keys of a configuration that aren't fields of the rule.
_NOT_FIELDS: Final = ("method", "description")


def get_rule(config: Mapping[str, Any]) -> type[Rule]:
    """Return the rule class of a configuration's method.

    Raises:
        InputError: the method is missing or unknown.
    """
    if "method" not in config:
        raise InputError(f"a configuration needs a method; known: {', '.join(RULES)}")
    name = config["method"]
    method = _ALIASES.get(name, name) if isinstance(name, str) else str(name)
    if method not in RULES:
        raise unknown_name("method", str(name), [*RULES, *_ALIASES])
    return RULES[method]


def make_rule(config: Mapping[str, Any]) -> Rule:
    """Build a rule from a configuration: a method, its fields, and optionally a description.

    Raises:
        InputError: the method or a key is missing or unknown, or a value is out of range.
    Example:
        >>> make_rule({"method": "topk", "k": 4, "description": "half of the experts"}).k
        4
    """
    rule = get_rule(config)
    method = rule.method
    own = {key: value for key, value in config.items() if key not in _NOT_FIELDS}
    known = [field.name for field in fields(rule)]  # type: ignore[arg-type]
    for key in own:
        if key not in known:
            raise unknown_name(f"key of method {method!r}", str(key), [*known, "description"])
    required = [f.name for f in fields(rule) if f.default is MISSING]  # type: ignore[arg-type]
    for key in required:
        if key not in own:
            raise InputError(f"method {method!r} needs the key {key!r}; known: {', '.join(known)}")
    return rule(**own)


def rule_to_config(rule: Rule) -> dict[str, Any]:
    """Return the configuration from which `make_rule` builds an equal rule, defaults included.

    It is plain JSON data: rules are equal if and only if these are, also after a JSON round trip.

    Example:
        >>> rule_to_config(TopK(8))["method"]
        'top_k'
    """
    own = {field.name: getattr(rule, field.name) for field in fields(rule)}  # type: ignore[arg-type]
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in own.items()}
    return {"method": rule.method, **plain}


def name_of_text(text: str) -> str:
    """Turn a rule in one word into a configuration's name.

    Example:
        >>> name_of_text("bh:alpha=0.02,max_k=6")
        'bh_alpha-0.02_max_k-6'
    """
    name = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text.strip().replace(":", "_").replace(",", "_"))
    if len(name) > _NAME_LENGTH:  # two long rules may begin alike
        name = f"{name[: _NAME_LENGTH - 9]}-{json_digest(text)[:8]}"
    return name


def name_rules(rules: Mapping[str, Rule] | Iterable[Rule]) -> dict[str, Rule]:
    """Return rules by name, named after their fields where they have no name.

    Args:
        rules: name -> rule, or rules alone.
    Raises:
        InputError: there is none, one is given twice, or something is not a rule or a name.
    Example:
        >>> list(name_rules([TopK(4), BenjaminiHochberg(alpha=0.02, max_k=6)]))
        ['top_k_k-4', 'bh_alpha-0.02_max_k-6']
    """
    if isinstance(rules, str | type) or not isinstance(rules, Iterable):
        raise InputError(
            f"rules must be a list of rules or a mapping of names to rules, got {rules!r}; for one "
            "rule write [rule]"
        )
    is_named = isinstance(rules, Mapping)
    named: dict[str, Rule] = {}
    for name, rule in rules.items() if isinstance(rules, Mapping) else ((None, r) for r in rules):
        if not isinstance(rule, Rule):
            raise InputError(
                f"a rule must be an object such as BenjaminiHochberg(alpha=0.05), got {rule!r} of "
                f"type {type(rule).__name__}"
            )
        if is_named and not (isinstance(name, str) and name):
            raise InputError(f"a rule's name must be a text that isn't empty, got {name!r}")
        key = name or _name(rule)
        if key in named:
            raise InputError(f"rule {key!r} is given twice; remove one")
        named[key] = rule
    if not named:
        raise InputError("rules must not be empty; give at least one")
    return named


def _name(rule: Rule) -> str:
    """Join the method and the fields that aren't at their defaults; what is tuned always shows."""
    tuned = "" if rule.knob is None else rule.knob.name
    shown = [
        f"{f.name}={value}"
        for f in fields(rule)  # type: ignore[arg-type]
        if (value := getattr(rule, f.name)) != f.default or f.name == tuned
    ]
    return name_of_text(f"{rule.method}:{','.join(shown)}" if shown else rule.method)
