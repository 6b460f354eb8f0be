"""Rules: which of the slots that a router proposes stay, and what weights they get."""

from bh_routing.rules.base import (
    Candidates,
    LayerContext,
    Rule,
    Selector,
    TemperatureWeights,
    WeightConvention,
)
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.catalog import RULES, make_rule, rule_to_config
from bh_routing.rules.functional import RoutedExperts, benjamini_hochberg_routing
from bh_routing.rules.top_k import TopK
from bh_routing.rules.weights import AliasedSlots, alias_dropped, kept_weights

__all__ = [
    "RULES",
    "AliasedSlots",
    "BenjaminiHochberg",
    "Candidates",
    "LayerContext",
    "RoutedExperts",
    "Rule",
    "Selector",
    "TemperatureWeights",
    "TopK",
    "WeightConvention",
    "alias_dropped",
    "benjamini_hochberg_routing",
    "kept_weights",
    "make_rule",
    "rule_to_config",
]
