"""Null distributions of the scores of irrelevant experts, and p-values under them."""

from bh_routing.nulls.base import AlphaMeaning, Null, ReferenceTable, RouterPass
from bh_routing.nulls.calibration import Calibration
from bh_routing.nulls.catalog import NULLS, get_null, p_values
from bh_routing.nulls.cut_offs import count_at_cut_offs, cut_offs
from bh_routing.nulls.reservoir import Reservoir, reservoir_capacity

__all__ = [
    "NULLS",
    "AlphaMeaning",
    "Calibration",
    "Null",
    "ReferenceTable",
    "Reservoir",
    "RouterPass",
    "count_at_cut_offs",
    "cut_offs",
    "get_null",
    "p_values",
    "reservoir_capacity",
]
