"""Rule variants for a search, and the allocation of per-layer top-k's budget to layers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from tqdm import tqdm

from bh_routing.engine.score import score
from bh_routing.errors import InputError
from bh_routing.experiments.configurations import parse_rule
from bh_routing.experiments.quality_text import QualityText
from bh_routing.models.routers import find_routers
from bh_routing.rules.base import Knob, Rule
from bh_routing.rules.catalog import get_rule, make_rule, name_rules, rule_to_config
from bh_routing.rules.fixed import PerLayerTopK, TopK

_ALSO: Final = {"contribution_threshold": "population BH"}
"""Equivalent procedures: BH over the calibration's slots decides like a fixed threshold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A rule without a value of its tuning parameter."""

    name: str
    """Prefix of a configuration's name."""
    config: Mapping[str, Any]
    """The rule's configuration; its tuning parameter, if given, is replaced."""

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
        """The rule's tuning parameter.

        Raises:
            InputError: the rule has none.
        """
        knob = get_rule(self.config).knob
        if knob is None:
            raise InputError(
                f"rule {self.method!r} has no tuning parameter, so it can't be brought to a "
                "budget; leave it out"
            )
        return knob

    def at(self, value: float, num_layers: int = 1) -> Rule:
        """Return the rule for a value of its tuning parameter.

        Raises:
            InputError: a field is invalid.
        """
        return make_rule({**self.config, **self.knob.fields(value, num_layers)})

    def anywhere(self) -> Rule:
        """Return the rule at an arbitrary value, for properties that don't depend on it."""
        low, high = self.knob.scale.ends(model_top_k=1)
        return self.at(self.knob.scale.value_at((low + high) / 2))


def parse_variants(texts: Sequence[str]) -> list[Variant]:
    """Parse `method` or `method:field=value,…`, separated by commas, without tuning parameters.

    Static top-k, the reference of comparisons, is left out.

    Raises:
        InputError: a rule is unknown, given twice, or has no tuning parameter or a value for it.
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
        raise InputError("no rule is left to sweep; give one other than top_k, such as bh_drop")
    return variants


def variants_of(rules: Mapping[str, Rule] | Iterable[Rule]) -> list[Variant]:
    """Turn rules into variants, whose tuning parameters are set by budgets.

    Static top-k is left out: it is what the others are compared with.

    Raises:
        InputError: no rule is left, or one has no tuning parameter or differs in it alone.
    """
    variants: list[Variant] = []
    for given, rule in name_rules(rules).items():
        if isinstance(rule, TopK):
            continue
        config = rule_to_config(rule)
        shown = {
            f.name: config[f.name]
            for f in fields(rule)  # type: ignore[arg-type]
            if config[f.name] != f.default and not (rule.knob and rule.knob.sets(f.name))
        }
        name = given if isinstance(rules, Mapping) else _name({"method": rule.method, **shown})
        variant = Variant(name=name, config=config)
        for other in variants:
            if variant.anywhere() == other.anywhere() or name == other.name:
                raise InputError(
                    f"rules {other.name!r} and {name!r} differ only in {variant.knob.name}, which "
                    "the budget sets; leave one out"
                )
        variants.append(variant)
    if not variants:
        raise InputError("no rule is left to sweep; give one other than top_k, such as bh_drop")
    return variants


def _split(texts: Sequence[str]) -> list[str]:
    """Split at commas that start a rule, before a word that has no `=`, or has `:` before it."""
    found: list[str] = []
    for item in (part.strip() for text in texts for part in text.split(",")):
        method = item.partition("=")[0] if "=" in item else f"{item}:"
        if item and (":" in method or not found):
            found.append(item)
        elif item:
            found[-1] += ("," if ":" in found[-1] else ":") + item
    return found


def _name(config: Mapping[str, Any]) -> str:
    """Join the method and its fields: words alone, numbers with the names of their fields."""
    parts = [
        str(value) if isinstance(value, str) else f"{field}-{value}"
        for field, value in config.items()
    ]
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", "-".join(parts))


LAYER_TOKENS: Final = 2_000
"""Tokens of calibration text per pass."""
MAX_PASSES: Final = 120
"""Maximum number of passes; models with more than half as many layers need two per layer."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerLosses:
    """Increases in loss over the model's own top-k, in nats per token."""

    model_top_k: int
    counts: tuple[int, ...]
    """Measured values of a layer's k, ascending, all below the model's own k."""
    by_layer: tuple[tuple[float, ...], ...]
    """For each layer, the loss at each of these counts."""

    def share_out(self, mean_experts: float) -> PerLayerTopK:
        """Return the per-layer top-k of this mean with the lowest loss, if losses add up.

        Measured losses are smoothed: on few tokens dropping an expert can seem to cost nothing,
        which would dominate the whole allocation.
        """
        if not self.counts:
            return PerLayerTopK((1,) * len(self.by_layer))
        measured_LC = np.array(self.by_layer)
        # Relative errors: the loss at k = 1 is a hundred times that at the model's own k less 1.
        scale_C = np.maximum(np.abs(measured_LC).mean(axis=0), 1e-12)
        some_CB = _convex_shapes(np.array(self.counts), self.model_top_k)
        all_KB = _convex_shapes(np.arange(1, self.model_top_k + 1), self.model_top_k)
        fits_LB = [nnls(some_CB / scale_C[:, None], row / scale_C)[0] for row in measured_LC]
        return PerLayerTopK.from_losses(mean_experts, [(all_KB @ fit).tolist() for fit in fits_LB])

    def to_document(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "model_top_k": self.model_top_k,
            "counts": list(self.counts),
            "by_layer": [list(losses) for losses in self.by_layer],
        }

    @classmethod
    def recall(cls, documents: Iterable[Mapping[str, Any]], search: str) -> LayerLosses | None:
        """Return the losses that an earlier search of the same kind stored, if any."""
        for entry in documents:
            try:
                if entry["search"] == search:
                    kept = entry["layer_losses"]
                    by_layer = tuple(tuple(map(float, losses)) for losses in kept["by_layer"])
                    return cls(int(kept["model_top_k"]), tuple(map(int, kept["counts"])), by_layer)
            except (KeyError, TypeError, ValueError):
                continue
        return None


def _convex_shapes(counts_C: NDArray[Any], model_top_k: int) -> NDArray[Any]:
    """Return convex curves of loss by k, zero at the model's own k; their sums are convex too."""
    powers_B = np.array([1.0, 2.0, 4.0])
    return np.asarray(counts_C[:, None] ** -powers_B - model_top_k**-powers_B)


def counts_to_measure(model_top_k: int, num_layers: int) -> tuple[int, ...]:
    """Return as many counts as MAX_PASSES allows, evenly spaced, from 1 to below the model's own k.

    Example:
        >>> counts_to_measure(8, num_layers=6), counts_to_measure(8, num_layers=48)
        ((1, 2, 3, 4, 5, 6, 7), (1, 4))
    """
    most = min(model_top_k - 1, max(2, MAX_PASSES // num_layers))
    return tuple(1 + i * (model_top_k - 1) // most for i in range(most))


def measure_layer_losses(model: Any, tokenizer: Any, text: QualityText) -> LayerLosses:
    """Measure the loss for each layer and count, with the model's own k in every other layer.

    Args:
        model, tokenizer: as for `score`.
        text: calibration text; LAYER_TOKENS are enough.
    """
    routers = find_routers(model)
    num_layers, model_top_k = len(routers.sites), routers.model_top_k
    counts = counts_to_measure(model_top_k, num_layers)
    if len(counts) < model_top_k - 1:
        log.info(
            "losses by layer are measured at %s of %d experts only, for %d layers",
            "/".join(map(str, counts)), model_top_k, num_layers,
        )  # fmt: skip
    rules = {
        f"{layer}@{count}": PerLayerTopK(
            tuple(count if other == layer else model_top_k for other in range(num_layers))
        )
        for layer in range(num_layers)
        for count in counts
    }
    rises = dict.fromkeys(rules, 0.0)
    num_tokens = sum(len(document.ids) for document in text.documents)
    records = score(model, tokenizer, text.documents, rules, window=text.window, stride=text.stride)
    total = num_tokens * len(rules)
    with tqdm(total=total, unit="token", desc="layers", unit_scale=True) as bar:
        for record in records:
            rises[record.config_name] += record.nll_sum - record.top_k_nll_sum
            bar.update(record.tokens)
    return LayerLosses(
        model_top_k=model_top_k,
        counts=counts,
        by_layer=tuple(
            tuple(rises[f"{layer}@{count}"] / num_tokens for count in counts)
            for layer in range(num_layers)
        ),
    )
