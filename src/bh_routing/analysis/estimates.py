"""Public statistics, for the report, the summary, the command line and lm-eval.

paired.py        two configurations on the same prompts: t, Wilcoxon, d_z
clustered.py     ratios over documents: interval, tests, non-inferiority, detectable effect
bootstrap.py     their resampling and the cluster-robust standard error
accuracies.py    right or wrong on the same questions: McNemar, flips
multiplicity.py  Holm; Benjamini-Hochberg for exploration
"""

from bh_routing.stats.accuracies import AccuracyComparison, compare_accuracies
from bh_routing.stats.bootstrap import (
    ClusterBootstrap,
    Ends,
    cluster_bootstrap,
    cluster_standard_error,
    sum_clusters,
)
from bh_routing.stats.clustered import (
    NON_INFERIORITY_MARGIN,
    NonInferiority,
    RatioEstimate,
    estimate_ratio,
    minimum_detectable_effect,
    non_inferiority,
)
from bh_routing.stats.multiplicity import BH_LABEL, benjamini_hochberg_exploratory, holm
from bh_routing.stats.paired import (
    EXACT_PAIRS,
    MeanInterval,
    PairedEstimate,
    mean_interval,
    paired_difference,
    signed_rank_floor,
)

__all__ = [
    "BH_LABEL",
    "EXACT_PAIRS",
    "NON_INFERIORITY_MARGIN",
    "AccuracyComparison",
    "ClusterBootstrap",
    "Ends",
    "MeanInterval",
    "NonInferiority",
    "PairedEstimate",
    "RatioEstimate",
    "benjamini_hochberg_exploratory",
    "cluster_bootstrap",
    "cluster_standard_error",
    "compare_accuracies",
    "estimate_ratio",
    "holm",
    "mean_interval",
    "minimum_detectable_effect",
    "non_inferiority",
    "paired_difference",
    "signed_rank_floor",
    "sum_clusters",
]
