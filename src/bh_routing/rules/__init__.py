"""Rules: selection among the slots that a router proposes, and weights of the kept slots."""

from bh_routing.rules.base import LayerContext, Rule, TemperatureWeights, Unit, WeightConvention
from bh_routing.rules.benjamini_hochberg import BenjaminiHochberg
from bh_routing.rules.catalog import RULES, make_rule, rule_to_config
from bh_routing.rules.contribution import ContributionThreshold, OracleContribution
from bh_routing.rules.drop import BenjaminiHochbergDrop
from bh_routing.rules.fixed import PerLayerTopK, RandomK, TopK
from bh_routing.rules.functional import RoutedExperts, benjamini_hochberg_routing
from bh_routing.rules.higher_criticism import HigherCriticism
from bh_routing.rules.mass import Entropy, FloorThreshold, MinP, Threshold, TopP
from bh_routing.rules.noise import NoiseResult, noise_control
from bh_routing.rules.plan import Candidates, Plan, Rows, Selector
from bh_routing.rules.router import Weighing, alias_dropped
from bh_routing.rules.step import ExpertBudget, FisherMass, OpportunisticActivation

__all__ = [
    "RULES",
    "BenjaminiHochberg",
    "BenjaminiHochbergDrop",
    "Candidates",
    "ContributionThreshold",
    "Entropy",
    "ExpertBudget",
    "FisherMass",
    "FloorThreshold",
    "HigherCriticism",
    "LayerContext",
    "MinP",
    "NoiseResult",
    "OpportunisticActivation",
    "OracleContribution",
    "PerLayerTopK",
    "Plan",
    "RandomK",
    "RoutedExperts",
    "Rows",
    "Rule",
    "Selector",
    "TemperatureWeights",
    "Threshold",
    "TopK",
    "TopP",
    "Unit",
    "Weighing",
    "WeightConvention",
    "alias_dropped",
    "benjamini_hochberg_routing",
    "make_rule",
    "noise_control",
    "rule_to_config",
]
