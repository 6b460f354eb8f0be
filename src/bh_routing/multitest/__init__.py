"""Multiple testing on tensors of p-values, independent of routers and models."""

from bh_routing.multitest.step_up import (
    Procedure,
    benjamini_hochberg,
    benjamini_yekutieli,
    check_alpha,
    count_rejected,
    on_or_below_line,
    storey,
)

__all__ = [
    "Procedure",
    "benjamini_hochberg",
    "benjamini_yekutieli",
    "check_alpha",
    "count_rejected",
    "on_or_below_line",
    "storey",
]
