"""Findings of a run with their certainty, and titles of charts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from bh_routing.analysis.comparisons import SIGNIFICANCE_LEVEL
from bh_routing.report.facts import Facts
from bh_routing.report.quality import QualityFindings
from bh_routing.report.text import cut_middle, listed, loss_percent, number, plain, signed_percent
from bh_routing.stats.paired import MeanInterval, holm, mean_interval, paired_difference

NAME_LIMIT = 24
UNSTEADY = 0.10
"""The speed of a quiet machine varies by a few percent only."""

Side = Literal["below", "above", "same", "undecided", "unknown"]
"""Position of a configuration relative to the baseline, as far as the data decide it."""
Steadiness = Literal["steady", "unsteady", "unknown"]


ONE_MACHINE = "one machine"


def place(run: Mapping[str, Any]) -> str:
    """Return the machine or machines on which experiments ran, to follow "on"; empty if unknown."""
    executor, sessions = run.get("executor"), run.get("sessions")
    if isinstance(executor, Mapping) and executor.get("name") == "ray":
        return f"{executor.get('workers')} workers of a Ray cluster"
    machines = {
        tuple(str(session.get(key)) for key in ("platform", "cpu_count"))
        for session in (sessions if isinstance(sessions, list) else [])
        if isinstance(session, Mapping)
    }
    if len(machines) > 1:
        return f"{len(machines)} machines, since the run was resumed on another"
    return ONE_MACHINE if run else ""


def rounds(facts: Facts) -> str:
    """Format the number of interleaved timing rounds, or the smallest and the largest."""
    known = sorted(found.whole.n for found in facts.speed_ups.values())
    return str(known[0]) if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


def side(change: MeanInterval) -> Side:
    """Return the position of an interval relative to 0."""
    if not (math.isfinite(change.low) and math.isfinite(change.high)):
        return "unknown"
    return "below" if change.high < 0 else "above" if change.low > 0 else "undecided"


def expert_sides(facts: Facts) -> dict[str, Side]:
    """Return whether each configuration keeps fewer or more experts than the baseline.

    Decided if all prompts agree, since counts don't vary between runs, or else by the paired t
    test, corrected by Holm over the configurations.
    """
    names = facts.others if facts.baseline is not None else []
    pairs = {name: facts.paired(name, "avg_experts_per_token") for name in names}
    tests = {name: paired_difference(*pair) for name, pair in pairs.items()}
    corrected = holm([test.p for test in tests.values()])
    found: dict[str, Side] = {}
    for (name, test), p in zip(tests.items(), corrected, strict=True):
        difference_n = np.subtract(*pairs[name])
        if not difference_n.size:
            found[name] = "unknown"
        elif (difference_n == 0).all():
            found[name] = "same"
        elif (np.sign(difference_n) == np.sign(difference_n[0])).all() or p < SIGNIFICANCE_LEVEL:
            found[name] = "below" if test.mean < 0 else "above"
        else:
            found[name] = "undecided" if math.isfinite(p) else "unknown"
    return found


def balance_sides(facts: Facts) -> dict[str, Side]:
    """Return whether the load is more even (below) than the baseline's, in units of noise."""
    names = facts.others if facts.baseline is not None else []
    differences = {n: np.subtract(*facts.paired(n, "load_over_noise")) for n in names}
    return {
        name: "same" if len(own_n) and not own_n.any() else side(mean_interval(own_n))
        for name, own_n in differences.items()
    }


def experts(facts: Facts) -> str:
    """State the mean experts kept, compared with the baseline."""
    means = {name: facts.mean_of(name, "avg_experts_per_token") for name in facts.names}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not means:
        return "No experiment has a count of experts"
    others = {name: mean for name, mean in means.items() if name != facts.baseline}
    if not others:
        name, mean = next(iter(means.items()))
        return f"{show(name)} keeps {number(mean)} experts per token"
    low, high = min(others, key=others.__getitem__), max(others, key=others.__getitem__)
    kept = f"{number(others[low])} experts"
    if low != high:
        kept = f"from {number(others[low])} ({show(low)}) to {number(others[high])} ({show(high)})"
    else:
        kept = f"{kept} ({show(low)})"
    if facts.baseline not in means:
        return f"Experts kept per token: {kept}"
    baseline = f"{show(facts.baseline)} keeps {number(means[facts.baseline])}"
    return f"Experts kept per token: {kept}; {baseline}"


def time(facts: Facts) -> str:
    """State the changes of time against the baseline."""
    changes = facts.time_changes
    if not changes:
        return "Generation time by configuration"
    slower = [name for name, change in changes.items() if change.low > 0]
    faster = [name for name, change in changes.items() if change.high < 0]
    low = signed_percent(min(change.mean for change in changes.values()))
    high = signed_percent(max(change.mean for change in changes.values()))
    span = low if low == high else f"{low} to {high}"
    against = f"against {show(facts.baseline)}"
    if is_unsteady(facts):
        return f"Time {against}: {span}, on a machine of unsteady speed"
    if not slower and not faster and not any(math.isfinite(c.low) for c in changes.values()):
        return f"Time {against}: {span}, from too few prompts for an interval"
    if len(slower) == len(changes):
        return f"Every configuration is slower than {show(facts.baseline)}: {span} time"
    if len(faster) == len(changes):
        return f"Every configuration is faster than {show(facts.baseline)}: {span} time"
    if not slower and not faster:
        return f"No clear difference in time {against}: {span}"
    return f"Time {against}: {span}; {len(slower)} clearly slower, {len(faster)} clearly faster"


def speed_spread(facts: Facts) -> float:
    """Return the coefficient of variation of the baseline's decode time per token.

    With a fixed number of experts every token takes the same work, so variation between prompts is
    mostly that of the machine.
    """
    mine = facts.frame[facts.frame["config_name"] == facts.baseline]
    steps = (mine["num_output_tokens"] - 1).where(mine["num_output_tokens"] > 1)
    per_token = (mine["decode_time_sec"] / steps).dropna()
    return float(per_token.std() / per_token.mean()) if len(per_token) > 2 else math.nan


def steadiness(facts: Facts) -> Steadiness:
    """Return whether the machine's speed was steady; unknown from too few or too short texts."""
    spread = speed_spread(facts)
    if not math.isfinite(spread):
        return "unknown"
    return "unsteady" if spread > UNSTEADY else "steady"


def grouped(sides: Mapping[str, str]) -> dict[str, list[list[str]]]:
    """Group names by side; sides without names are left out."""
    found: dict[str, list[list[str]]] = {}
    for name, where in sides.items():
        found.setdefault(where, [[]])[0].append(name)
    return found


def time_sides(facts: Facts) -> dict[str, list[list[str]]]:
    """Group configurations by time, and slower ones by whether they keep fewer experts.

    Groups are faster, slower_with_fewer, slower, undecided and unknown; `fewer` has all that keep
    fewer experts, and `faster_with_fewer` the faster ones among them.
    """
    experts_kept = expert_sides(facts)
    found: dict[str, list[list[str]]] = {}
    for name, change in facts.time_changes.items():
        where, is_fewer = side(change), experts_kept.get(name) == "below"
        groups = [{"below": "faster", "above": "slower"}.get(where, where)]
        if is_fewer and where == "above":
            groups = ["slower_with_fewer"]
        if is_fewer:
            groups += ["fewer", *(["faster_with_fewer"] if where == "below" else [])]
        for group in groups:
            found.setdefault(group, [[]])[0].append(name)
    return found


def is_unsteady(facts: Facts) -> bool:
    """Return whether the machine's speed varied too much to compare times.

    Interleaved timings can always be compared: their intervals cover the remaining variation.
    """
    return not facts.speed_ups and steadiness(facts) == "unsteady"


def balance(facts: Facts) -> str:
    """State the variation of the expert load, and that expected from noise alone."""
    means = {name: facts.mean_of(name, "expert_utilization_cv") for name in facts.names}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not means:
        return "No experiment has a measure of load balance"
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    parts = []
    for name in dict.fromkeys((low, high)):
        noise = facts.mean_of(name, "expert_utilization_cv_noise")
        alone = f", of which noise alone {number(noise)}" if math.isfinite(noise) else ""
        parts.append(f"{number(means[name])} ({show(name)}{alone})")
    return f"Load varies by {' to '.join(parts)} of its mean"


def by_category(facts: Facts) -> str:
    """State the largest spread between categories of prompts."""
    means = facts.frame.groupby(["config_name", "prompt_category"], sort=False)
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


def latency(facts: Facts) -> str:
    """State whether fewer experts coincided with less time."""
    changes, experts_kept = facts.time_changes, expert_sides(facts)
    fewer = {n: side(change) for n, change in changes.items() if experts_kept.get(n) == "below"}
    if not fewer:
        return "Experts kept and time per generated token"
    faster = [name for name, found in fewer.items() if found == "below"]
    slower = [name for name, found in fewer.items() if found == "above"]
    if is_unsteady(facts):
        return "Speed varied too much to say whether fewer experts save time"
    if len(faster) == len(fewer):
        return "Fewer experts took less time in every configuration that keeps fewer"
    if len(slower) == len(fewer):
        return "Fewer experts did not save time: every configuration that keeps fewer is slower"
    if not faster:
        return "Fewer experts did not clearly save time in any configuration"
    return f"Fewer experts clearly saved time in {listed(show(name) for name in faster)} only"


def show(name: object) -> str:
    """Format a configuration's name for a title."""
    return cut_middle(plain(name), NAME_LIMIT) or "(no name)"


def quality(found: QualityFindings) -> str:
    """State the configurations' losses, and that of static top-k at the same mean."""
    tested = found.whole
    if not tested:
        return "Perplexity of static top-k by number of experts"
    span = loss_percent(found.least.perplexity_ratio)
    if found.most is not found.least:
        span = f"{span} to {loss_percent(found.most.perplexity_ratio)}"
    experts_kept = sorted(row.mean_experts for row in tested)
    ends = dict.fromkeys(number(mean, 1) for mean in (experts_kept[0], experts_kept[-1]))
    cost = f"Keeping {' to '.join(ends)} experts changes perplexity by {span}"
    counts = {answer: len(rows) for answer, (rows,) in found.against.items()}
    compared = sum(counts.values())
    if not compared:
        return cost
    if counts.get("undecided") == compared:
        return f"{cost}; no clear difference from static top-k at the same mean"
    words = {"no": "lower", "yes": "higher"}
    if len(counts) == 1:
        (answer,) = counts
        return f"{cost}; that of static top-k is {words[answer]} at the same mean"
    sides = {"no": "above", "yes": "below"}
    texts = [f"{counts[side]} clearly {sides[side]}" for side in sides if side in counts]
    return f"{cost}; of {compared} configurations {' and '.join(texts)} static top-k"
