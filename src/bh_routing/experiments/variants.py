"""A rule without its knob: what a search for a mean number of experts is to bring to a budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bh_routing.errors import InputError
from bh_routing.experiments.rule_text import parse_rule
from bh_routing.rules.base import Rule
from bh_routing.rules.catalog import get_rule, make_rule
from bh_routing.rules.knobs import Knob
from bh_routing.rules.top_k import TopK

DEFAULT_VARIANTS: Final = (
    "bh",
    "bh_drop:statistic=sensitivity",
    "bh_drop:scope=block,statistic=sensitivity",
    "contribution_threshold:statistic=sensitivity",
    "top_p",
    "per_layer_top_k",
    "min_p",
    "entropy",
    "random_k",
)
_ALSO: Final = {"contribution_threshold": "population BH"}
"""What else a rule is: BH over the calibration's slots decides like a fixed threshold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A rule with everything but its knob."""

    name: str
    """Start of a configuration's name."""
    config: Mapping[str, Any]
    """The rule's configuration; the knob in it, if there is one, is replaced."""

    @property
    def method(self) -> str:
        """The rule's name in the catalog."""
        return get_rule(self.config).method

    @property
    def label(self) -> str:
        """The name for tables."""
        also = _ALSO.get(self.method)
        return f"{self.name} (= {also})" if also else self.name

    @property
    def knob(self) -> Knob:
        """What is turned.

        Raises:
            InputError: the rule has none.
        """
        knob = get_rule(self.config).knob
        if knob is None:
            raise InputError(
                f"rule {self.method!r} declares no knob, so it can't be brought to a budget; "
                "leave it out"
            )
        return knob

    def at(self, value: float, num_layers: int = 1) -> Rule:
        """Return the rule at a value of its knob.

        Raises:
            InputError: a field isn't allowed.
        """
        return make_rule({**self.config, **self.knob.fields(value, num_layers)})

    def anywhere(self) -> Rule:
        """Return the rule at some value: for what doesn't depend on the knob."""
        low, high = self.knob.scale.ends(model_top_k=1)
        return self.at(self.knob.scale.value_at((low + high) / 2))


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """Read `method` or `method:field=value,…`, several separated by commas, without knobs.

    Static top-k is left out: it is what the others are compared with.

    Raises:
        InputError: a rule is unknown, given twice, has no knob or gives its knob a value.
    Example:
        >>> [v.name for v in parse_variants(["top_p,bh_drop:scope=block,min_k=2,min_p"])]
        ['top_p', 'bh_drop-block-min_k-2', 'min_p']
    """
    variants: list[Variant] = []
    for text in _split(texts):
        _, config = parse_rule(text)
        config["method"] = get_rule(config).method
        if config["method"] == TopK.method:
            continue
        variant = Variant(name=_name(config), config=config)
        knob = variant.knob
        for field in config:
            if knob.sets(field):
                raise InputError(
                    f"rule {text!r} sets {field!r}, which is what the sweep turns; leave it out"
                )
        rule = variant.anywhere()
        if any(rule == other.anywhere() for other in variants):
            raise InputError(f"rule {text!r} is there twice; give it once")
        variants.append(variant)
    if not variants:
        raise InputError("no rule is left to sweep; give one beside top_k, such as bh_drop")
    return variants


def _split(texts: Sequence[str]) -> list[str]:
    """Split at commas that start a rule: those before a word without `=` or with `:` before it."""
    found: list[str] = []
    for item in (part.strip() for text in texts for part in text.split(",")):
        method = item.partition("=")[0] if "=" in item else f"{item}:"
        if item and (":" in method or not found):
            found.append(item)
        elif item:
            found[-1] += ("," if ":" in found[-1] else ":") + item
    return found


def _name(config: Mapping[str, Any]) -> str:
    """Join the method and its fields: words by themselves, numbers with what they are."""
    parts = [
        str(value) if isinstance(value, str) else f"{field}-{value}"
        for field, value in config.items()
    ]
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", "-".join(parts))
