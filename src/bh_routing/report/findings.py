"""One sentence a picture: what the numbers show, by rule."""

from __future__ import annotations

import math

from bh_routing.analysis.estimates import MeanInterval, mean_interval
from bh_routing.report.quality import QualityRow, reference_at
from bh_routing.report.table import Experiments
from bh_routing.report.text import cut_middle, listed, loss_percent, number, plain, signed_percent

NAME_LIMIT = 24
UNSTEADY = 0.10
"""A quiet machine stays within a few percent of its speed."""


def experts(table: Experiments) -> str:
    """Say how many experts are kept, against the baseline's."""
    means = {name: table.mean(name, "avg_experts_per_token") for name in table.names}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not means:
        return "No experiment has a count of experts"
    others = {name: mean for name, mean in means.items() if name != table.baseline}
    if not others:
        name, mean = next(iter(means.items()))
        return f"{show(name)} keeps {number(mean)} experts per token"
    low, high = min(others, key=others.__getitem__), max(others, key=others.__getitem__)
    kept = f"{number(others[low])} experts"
    if low != high:
        kept = f"from {number(others[low])} ({show(low)}) to {number(others[high])} ({show(high)})"
    else:
        kept = f"{kept} ({show(low)})"
    if table.baseline not in means:
        return f"Experts kept per token: {kept}"
    return f"Experts kept per token: {kept}; {show(table.baseline)} keeps {_baseline(table)}"


def _baseline(table: Experiments) -> str:
    return number(table.mean(table.baseline or "", "avg_experts_per_token"))


def time(table: Experiments) -> str:
    """Say what a configuration costs in time, prompt by prompt against the baseline."""
    changes = time_changes(table)
    if not changes:
        return "Generation time by configuration"
    slower = [name for name, change in changes.items() if change.low > 0]
    faster = [name for name, change in changes.items() if change.high < 0]
    low = signed_percent(min(change.mean for change in changes.values()))
    high = signed_percent(max(change.mean for change in changes.values()))
    span = low if low == high else f"{low} to {high}"
    against = f"against {show(table.baseline)}"
    if is_unsteady(table):
        return f"Time {against}: {span}, on a machine of unsteady speed"
    if len(slower) == len(changes):
        return f"Every configuration is slower than {show(table.baseline)}: {span} time"
    if len(faster) == len(changes):
        return f"Every configuration is faster than {show(table.baseline)}: {span} time"
    if not slower and not faster:
        return f"No clear difference in time {against}: {span}"
    return f"Time {against}: {span}; {len(slower)} clearly slower, {len(faster)} clearly faster"


def time_changes(table: Experiments) -> dict[str, MeanInterval]:
    """The mean relative change of time against the baseline, with its interval.

    From rounds timed side by side; of an older run, prompt by prompt from one pass over them.
    """
    changes = {}
    if table.speed_ups:
        found = {
            name: table.speed_ups[name].change for name in table.others if name in table.speed_ups
        }
        return {name: change for name, change in found.items() if math.isfinite(change.low)}
    for name in table.others if table.baseline is not None else []:
        own_n, baseline_n = table.paired(name, "inference_time_sec")
        positive = baseline_n > 0
        change = mean_interval(own_n[positive] / baseline_n[positive] - 1.0)
        if math.isfinite(change.mean):
            changes[name] = change
    return changes


def speed_spread(table: Experiments) -> float:
    """Standard deviation over mean of the baseline's time per generated token, prompt excluded.

    A fixed number of experts is the same work for every token, so what varies between prompts is
    mostly the machine.
    """
    mine = table.frame[table.frame["config_name"] == table.baseline]
    steps = (mine["num_output_tokens"] - 1).where(mine["num_output_tokens"] > 1)
    per_token = (mine["decode_time_sec"] / steps).dropna()
    return float(per_token.std() / per_token.mean()) if len(per_token) > 2 else math.nan


def is_unsteady(table: Experiments) -> bool:
    """Whether the machine's own speed varied too much for times to be compared.

    What was timed side by side can be: its intervals hold what is left of that.
    """
    return not table.speed_ups and speed_spread(table) > UNSTEADY


def balance(table: Experiments) -> str:
    """Say who loads the experts least evenly, and what noise alone would show."""
    means = {name: table.mean(name, "expert_utilization_cv") for name in table.names}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not means:
        return "No experiment has a measure of load balance"
    worst = max(means, key=means.__getitem__)
    best = min(means, key=means.__getitem__)
    noise = table.mean(worst, "expert_utilization_cv_noise")
    alone = f" (noise alone {number(noise)})" if math.isfinite(noise) else ""
    if worst == best:
        return f"{show(worst)}: load varies by {number(means[worst])} of its mean{alone}"
    return (
        f"Load is least even in {show(worst)}: {number(means[worst])}{alone}; "
        f"most even in {show(best)}: {number(means[best])}"
    )


def by_category(table: Experiments) -> str:
    """Say how far the categories of prompts lie apart, where they lie furthest apart."""
    means = table.frame.groupby(["config_name", "prompt_category"], sort=False)
    by_pair = means["avg_experts_per_token"].mean().dropna()
    if by_pair.empty:
        return "No experiment has a count of experts"
    span = by_pair.groupby(level=0).max() - by_pair.groupby(level=0).min()
    widest = str(span.idxmax())
    mine = by_pair[widest]
    if len(mine) < 2:
        return f"One category of prompts: {plain(mine.index[0], NAME_LIMIT) or 'no name'}"
    ends = (
        f"{number(mine.min())} ({plain(mine.idxmin(), NAME_LIMIT)}) to "
        f"{number(mine.max())} ({plain(mine.idxmax(), NAME_LIMIT)})"
    )
    if float(number(span[widest])) == 0:
        return "Prompts of every category keep the same number of experts"
    return f"Categories lie furthest apart in {show(widest)}: {ends}"


def latency(table: Experiments) -> str:
    """Say whether keeping fewer experts went along with less time."""
    changes = time_changes(table)
    base = table.mean(table.baseline or "", "avg_experts_per_token")
    fewer = [n for n in changes if table.mean(n, "avg_experts_per_token") < base]
    if not fewer:
        return "Experts kept and time per generated token"
    faster = [name for name in fewer if changes[name].high < 0]
    slower = [name for name in fewer if changes[name].low > 0]
    if is_unsteady(table):
        return "Speed varied too much to say whether fewer experts save time"
    if len(faster) == len(fewer):
        return "Fewer experts took less time in every configuration"
    if len(slower) == len(fewer):
        return "Fewer experts did not save time: every configuration is slower"
    if not faster:
        return "Fewer experts did not clearly save time in any configuration"
    return f"Fewer experts clearly saved time in {listed(show(name) for name in faster)} only"


def show(name: object) -> str:
    """A configuration's name in a sentence of a title."""
    return cut_middle(plain(name), NAME_LIMIT) or "(no name)"


def quality(rows: list[QualityRow]) -> str:
    """Say what the configurations cost, and whether static top-k costs less at the same mean."""
    tested = [row for row in rows if not row.is_static]
    if not tested:
        return "Perplexity of static top-k by number of experts"
    behind = [row for row in tested if row.delta_nll > reference_at(rows, row.mean_experts)]
    compared = [row for row in tested if math.isfinite(reference_at(rows, row.mean_experts))]
    least = min(tested, key=lambda row: row.delta_nll)
    most = max(tested, key=lambda row: row.delta_nll)
    span = loss_percent(least.perplexity_ratio)
    if most is not least:
        span = f"{span} to {loss_percent(most.perplexity_ratio)}"
    cost = f"Keeping {_experts_span(tested)} experts changes perplexity by {span}"
    if not compared:
        return cost
    if len(behind) == len(compared):
        return f"{cost}; static top-k loses less at the same mean"
    if not behind:
        return f"{cost}; static top-k loses more at the same mean"
    return f"{cost}; static top-k loses less in {len(behind)} of {len(compared)}"


def _experts_span(rows: list[QualityRow]) -> str:
    ends = sorted(row.mean_experts for row in rows)
    low, high = number(ends[0], 1), number(ends[-1], 1)
    return low if low == high else f"{low} to {high}"
