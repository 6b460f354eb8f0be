"""Compare lm-eval tasks under several configurations with a reference, item by item.

Right-or-wrong metrics: the exact McNemar test and flips in both directions. Others: the difference
of sums divided by the sum of weights, such as log-likelihood per byte. Intervals are over clusters
if it is known which items are from one document. Holm's correction is applied over configurations,
separately for each metric of a task.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bh_routing.errors import InputError
from bh_routing.results.records import TaskOutcome
from bh_routing.stats.bootstrap import Floats
from bh_routing.stats.clustered import RatioEstimate, estimate_ratio
from bh_routing.stats.paired import compare_accuracies, holm


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskComparison:
    """One configuration compared with the reference on a metric of a task; NaN means unknown."""

    config_name: str
    reference: str
    task: str
    filter: str
    metric: str
    kind: str
    """right_or_wrong, or mean: a weighted mean, with weight 1 per item unless lm-eval gives one."""
    num_items: int
    num_clusters: int
    value: float
    """Mean over items of lm-eval's per-item values: for perplexity, log-likelihoods in nats."""
    reference_value: float
    difference: float
    low: float
    high: float
    """Ends of the 95 % interval of the difference."""
    gained: int | None
    """Items wrong under the reference and right under the configuration; None for a mean."""
    lost: int | None
    share_flipped: float | None
    p: float
    """Two-sided: exact McNemar, or the test of a zero mean difference."""
    p_corrected: float
    """p after Holm's correction over the configurations."""
    method: str
    """Method of the interval."""
    note: str


_Key = tuple[str, str, str]
"""Task, filter, metric."""


def compare_tasks(outcomes: Iterable[TaskOutcome], reference: str) -> list[TaskComparison]:
    """Compare every configuration with `reference` on every metric of every task.

    Args:
        outcomes: outcomes of all configurations, in any order.
        reference: name of the configuration to compare with.
    Returns:
        One comparison per metric and configuration other than the reference.
    Raises:
        InputError: two configurations answered different items, or the reference is missing.
    """
    by_config: dict[str, dict[_Key, dict[int, TaskOutcome]]] = {}
    for outcome in outcomes:
        metrics = by_config.setdefault(outcome.config_name, {})
        for metric in outcome.metrics:
            key = (outcome.task, outcome.filter, metric)
            metrics.setdefault(key, {})[outcome.item] = outcome
    if reference not in by_config:
        raise InputError(
            f"no outcome of the reference {reference!r}; there are: {', '.join(by_config)}"
        )
    comparisons = []
    for key, reference_items in by_config[reference].items():
        family = [
            _compare(name, reference, key, items[key], reference_items)
            for name, items in by_config.items()
            if name != reference and key in items
        ]
        comparisons += _corrected(family)
    return comparisons


def _compare(
    name: str,
    reference: str,
    key: _Key,
    own: Mapping[int, TaskOutcome],
    theirs: Mapping[int, TaskOutcome],
) -> TaskComparison:
    task, _, metric = key
    if {i: o.item_hash for i, o in own.items()} != {i: o.item_hash for i, o in theirs.items()}:
        raise InputError(
            f"task {task!r} was answered on different items; run all configurations anew, on "
            "the same items"
        )
    order = sorted(own)
    is_weighted = any(isinstance(own[i].metrics[metric], list) for i in order)
    values_N, _ = np.array([_sum_and_weight(own[i].metrics[metric]) for i in order]).T
    reference_N, weights_N = np.array([_sum_and_weight(theirs[i].metrics[metric]) for i in order]).T
    is_binary = bool(np.isin([values_N, reference_N], (0.0, 1.0)).all())
    is_right_or_wrong = is_binary and not is_weighted
    difference = estimate_ratio(
        values_N - reference_N, weights_N, [theirs[i].cluster for i in order]
    )
    ends = difference.interval()
    total = float(weights_N.sum())
    comparison = TaskComparison(
        config_name=name,
        reference=reference,
        task=task,
        filter=key[1],
        metric=metric,
        kind="right_or_wrong" if is_right_or_wrong else "mean",
        num_items=len(values_N),
        num_clusters=difference.num_clusters,
        value=float(values_N.sum()) / total,
        reference_value=float(reference_N.sum()) / total,
        difference=float(difference.estimate_R[0]),
        low=float(ends.low_R[0]),
        high=float(ends.high_R[0]),
        gained=None,
        lost=None,
        share_flipped=None,
        p=float(difference.p_different()[0]),
        p_corrected=math.nan,
        method=difference.method,
        note=difference.note,
    )
    if not is_right_or_wrong:
        return comparison
    return _with_flips(comparison, values_N, reference_N, difference)


def _with_flips(
    comparison: TaskComparison, values_N: Floats, reference_N: Floats, difference: RatioEstimate
) -> TaskComparison:
    flips = compare_accuracies(values_N, reference_N)
    are_independent = difference.num_clusters == len(values_N)
    notes = [flips.note]
    if not are_independent:
        notes += [
            difference.note,
            f"McNemar takes the {flips.n} items as independent; they are from "
            f"{difference.num_clusters} documents.",
        ]
    return dataclasses.replace(
        comparison,
        low=flips.low if are_independent else comparison.low,
        high=flips.high if are_independent else comparison.high,
        gained=flips.gained,
        lost=flips.lost,
        share_flipped=flips.share_flipped,
        p=flips.p,
        method="Bonett-Price" if are_independent else comparison.method,
        note=" ".join(note for note in notes if note),
    )


def _sum_and_weight(value: float | list[float]) -> tuple[float, float]:
    return (value[0], value[1]) if isinstance(value, list) else (value, 1.0)


def _corrected(family: Sequence[TaskComparison]) -> list[TaskComparison]:
    corrected = holm([comparison.p for comparison in family])
    return [
        dataclasses.replace(comparison, p_corrected=float(p))
        for comparison, p in zip(family, corrected, strict=True)
    ]
