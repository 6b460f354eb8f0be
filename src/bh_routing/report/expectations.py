"""What was expected of BH routing beforehand, and whether this run bears it out.

The expectations are those of OLMoE-1B-7B with the five standard configurations and twelve prompts.
They live in the tables below and nowhere else. A verdict is `met`, `not met` or `not comparable`;
the last two always say why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from bh_routing.analysis.estimates import signed_rank_floor
from bh_routing.report import findings
from bh_routing.report.facts import BALANCE, EXPERTS, Facts, child
from bh_routing.report.text import (
    as_float,
    code,
    markdown,
    number,
    p_value,
    percent,
    signed_percent,
)

Verdict = Literal["met", "not met", "not comparable"]

# Mean experts per token and layer: (configuration, low, high).
EXPERT_RANGES: Final = (
    ("topk_8", 8.0, 8.0),
    ("bh_strict", 3.5, 4.5),
    ("bh_moderate", 4.5, 5.5),
    ("bh_loose", 5.5, 6.5),
    ("bh_adaptive", 4.0, 5.0),
)
# Share of experts saved against Top-K: (configuration, low, high).
REDUCTION_RANGES: Final = (
    ("bh_strict", 0.45, 0.55),
    ("bh_moderate", 0.30, 0.45),
    ("bh_loose", 0.20, 0.30),
    ("bh_adaptive", 0.35, 0.50),
)
REDUCTION_OVERALL: Final = (0.30, 0.50)
P_BELOW: Final = 0.001
COHENS_D_ABOVE: Final = 0.8
SLOWER: Final = (0.05, 0.15)
TOP_K_CV: Final = (0.25, 0.35)
BH_CV: Final = (0.20, 0.30)
# Time of 60 experiments of OLMoE-1B-7B: (hardware as reported, shown as, minutes from, to).
DURATIONS: Final = (
    ("3090", "an RTX 3090", 15.0, 20.0),
    ("T4", "a T4", 25.0, 35.0),
    ("cpu:16", "a CPU with 16 cores", 90.0, 120.0),
)
MEMORY_GB: Final = (8.0, 20.0)
EXPECTED_EXPERIMENTS: Final = 60
EXPECTED_MODEL: Final = "OLMoE-1B-7B"
# What the expectations take a standard configuration to be.
_BH: Final[Mapping[str, str | float]] = {"method": "bh", "null": "background", "max_k": 8}
STANDARD_FIELDS: Final[Mapping[str, Mapping[str, str | float]]] = {
    "topk_8": {"method": "top_k", "k": 8},
    "bh_strict": {**_BH, "alpha": 0.01, "temperature": 1.0},
    "bh_moderate": {**_BH, "alpha": 0.05, "temperature": 1.0},
    "bh_loose": {**_BH, "alpha": 0.10, "temperature": 1.0},
    "bh_adaptive": {**_BH, "alpha": 0.05, "temperature": 2.0},
}
BASELINE: Final = "topk_8"
EXPECTED_SHAPE: Final = (64.0, 8.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One expectation beside what this run measured; every text is Markdown."""

    subject: str
    expected: str
    measured: str
    verdict: Verdict
    why: str = ""


def compare_expectations(facts: Facts) -> list[Line]:
    """Set every expectation beside this run, in the order of the tables above."""
    return [
        *(_experts(facts, *row) for row in EXPERT_RANGES),
        _p_values(facts),
        _effect_sizes(facts),
        _time(facts),
        _balance(facts, "Top-K", [] if _other_baseline(facts) else [BASELINE], TOP_K_CV),
        _balance(facts, "BH", _bh(facts), BH_CV),
        _overall_reduction(facts),
        *(_reduction(facts, *row) for row in REDUCTION_RANGES),
        *(_duration(facts, *row) for row in DURATIONS),
        _memory(facts),
    ]


def _bh(facts: Facts) -> list[str]:
    """The standard BH configurations that this run has, as they were expected to be."""
    return [name for name, _, _ in REDUCTION_RANGES if not _deviation(facts, name)]


def _deviation(facts: Facts, name: str) -> str:
    """Why a configuration of this name isn't the one that was expected; empty if it is."""
    shape = [as_float(facts.model.get(key)) for key in ("num_experts", "model_top_k")]
    if all(map(math.isfinite, shape)) and shape != list(EXPECTED_SHAPE):
        return f"the model has {shape[0]:g} experts, top-{shape[1]:g}, not 64, top-8"
    if name not in facts.names:
        return f"{code(name)} has no finished experiment in this run"
    config = facts.config(name)
    for field, expected in STANDARD_FIELDS[name].items():
        if (actual := config.get(field, expected)) != expected:
            return f"{code(name)} has {field} {markdown(str(actual), 30)} here, not {expected}"
    return ""


def _judge(value: float, low: float, high: float, digits: int) -> tuple[Verdict, str]:
    """Compare at the precision that is shown, so that the table never contradicts itself."""
    shown = round(value, digits)
    if low <= shown <= high:
        return "met", ""
    return "not met", "below the range" if shown < low else "above the range"


def _experts(facts: Facts, name: str, low: float, high: float) -> Line:
    expected = number(low) if low == high else f"{number(low, 1)} to {number(high, 1)}"
    subject = f"Experts, {code(name)}"
    mean = facts.table.mean(name, EXPERTS)
    why_not = _deviation(facts, name) or _missing(mean)
    if why_not:
        return _incomparable(subject, expected, number(mean), why_not)
    verdict, why = _judge(mean, low, high, 2)
    return Line(subject=subject, expected=expected, measured=number(mean), verdict=verdict, why=why)


def _reduction(facts: Facts, name: str, low: float, high: float) -> Line:
    subject, expected = f"Experts saved, {code(name)}", _range(low, high)
    share = facts.compared(name, EXPERTS, "reduction")
    why_not = _other_baseline(facts) or _deviation(facts, name) or _missing(share)
    if why_not:
        return _incomparable(subject, expected, percent(share, 1), why_not)
    verdict, why = _judge(share, low, high, 3)
    measured = percent(share, 1)
    return Line(subject=subject, expected=expected, measured=measured, verdict=verdict, why=why)


def _overall_reduction(facts: Facts) -> Line:
    subject, expected = "Experts saved, mean of the BH configurations", _range(*REDUCTION_OVERALL)
    shares = _compared(facts, "reduction")
    if not shares:
        return _incomparable(subject, expected, "", _no_test(facts))
    mean = sum(shares.values()) / len(shares)
    verdict, why = _judge(mean, *REDUCTION_OVERALL, 3)
    measured = percent(mean, 1)
    return Line(subject=subject, expected=expected, measured=measured, verdict=verdict, why=why)


def _p_values(facts: Facts) -> Line:
    subject = "Difference in experts, raw p of the paired t test"
    expected = f"p < {P_BELOW:g} in every BH configuration"
    tested = _compared(facts, "p")
    if not tested:
        return _incomparable(subject, expected, "", _no_test(facts))
    worst = max(tested, key=tested.__getitem__)
    prompts = int(facts.compared(worst, EXPERTS, "n"))
    floor = p_value(signed_rank_floor(prompts))
    why = f"an exact Wilcoxon test of {prompts} pairs can't go below {floor}, so t decides here"
    untested = [name for name in _bh(facts) if name not in tested]
    if untested:
        why = f"no test for {', '.join(map(code, untested))}; {why}"
    return Line(
        subject=subject,
        expected=expected,
        measured=f"largest: {p_value(tested[worst])} ({code(worst)})",
        verdict="met" if tested[worst] < P_BELOW and not untested else "not met",
        why=why,
    )


def _effect_sizes(facts: Facts) -> Line:
    subject, expected = "Cohen's d of that difference, paired", f"above {COHENS_D_ABOVE:g} in size"
    effects = {name: abs(d) for name, d in _compared(facts, "cohens_d").items()}
    if not effects:
        return _incomparable(subject, expected, "", _no_test(facts))
    least = min(effects, key=effects.__getitem__)
    return Line(
        subject=subject,
        expected=expected,
        measured=f"smallest: {number(effects[least], 1)} ({code(least)})",
        verdict="met" if effects[least] > COHENS_D_ABOVE else "not met",
        why="the unit is how much the difference varies between prompts",
    )


def _time(facts: Facts) -> Line:
    subject, expected = "Generation time of BH against Top-K", "5 % to 15 % longer"
    changes = {
        name: change.mean
        for name, change in findings.time_changes(facts.table).items()
        if name in _bh(facts) and not _other_baseline(facts)
    }
    if not changes:
        return _incomparable(
            subject, expected, "", _other_baseline(facts) or "no prompt was timed under both"
        )
    verdicts = {name: _judge(change, *SLOWER, 3) for name, change in changes.items()}
    reasons = {why: [n for n, found in verdicts.items() if found[1] == why]
               for _, why in verdicts.values() if why}  # fmt: skip
    off = [f"{', '.join(map(code, names))} {why}" for why, names in reasons.items()]
    if off and findings.is_unsteady(facts.table):
        off.append("the machine's own speed was not steady")
    ends = signed_percent(min(changes.values()), 1), signed_percent(max(changes.values()), 1)
    return Line(
        subject=subject,
        expected=expected,
        measured=ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}",
        verdict="not met" if off else "met",
        why="; ".join(off),
    )


def _balance(facts: Facts, label: str, names: list[str], limits: tuple[float, float]) -> Line:
    subject = f"Variation (CV) of expert load, {label}"
    expected = f"{number(limits[0])} to {number(limits[1])}"
    means = {name: facts.table.mean(name, BALANCE) for name in names}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not means:
        return _incomparable(
            subject, expected, "", f"no standard {label} configuration has a value"
        )
    ends = number(min(means.values())), number(max(means.values()))
    verdicts = {name: _judge(mean, *limits, 2) for name, mean in means.items()}
    noise = [facts.table.mean(name, f"{BALANCE}_noise") for name in means]
    off = [name for name, (verdict, _) in verdicts.items() if verdict != "met"]
    why = ", ".join(code(name) for name in off) + " outside the range" if len(means) > 1 else ""
    why = why if off else ""
    if off and min(noise) > limits[1]:
        floor = number(min(noise))
        why = f"so few tokens give {floor} or more by sampling noise alone, above the range"
    return Line(
        subject=subject,
        expected=expected,
        measured=ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}",
        verdict="not met" if off else "met",
        why=why or ("" if not off else verdicts[off[0]][1]),
    )


def _duration(facts: Facts, hardware: str, shown: str, low: float, high: float) -> Line:
    subject = f"{EXPECTED_EXPERIMENTS} experiments on {shown}"
    expected = f"{low:g} to {high:g} minutes"
    seconds = as_float(child(facts.run, "timing").get("experiments_sec"))
    minutes = seconds / 60.0
    measured = f"{number(minutes, 1)} minutes" if math.isfinite(minutes) else ""
    why_not = _other_hardware(facts, hardware) or _other_task(facts) or _missing(minutes)
    if why_not:
        return _incomparable(subject, expected, measured, why_not)
    verdict, why = _judge(minutes, low, high, 1)
    return Line(subject=subject, expected=expected, measured=measured, verdict=verdict, why=why)


def _memory(facts: Facts) -> Line:
    subject, expected = "Peak memory", f"{MEMORY_GB[0]:g} to {MEMORY_GB[1]:g} GB"
    gigabytes = as_float(facts.run.get("peak_memory_bytes")) / 1e9
    measured = f"{number(gigabytes, 1)} GB" if math.isfinite(gigabytes) else ""
    why_not = _missing(gigabytes) or _other_model(facts)
    if why_not:
        return _incomparable(subject, expected, measured, why_not)
    verdict, why = _judge(gigabytes, *MEMORY_GB, 1)
    return Line(subject=subject, expected=expected, measured=measured, verdict=verdict, why=why)


def _other_hardware(facts: Facts, hardware: str) -> str:
    device = str(facts.model.get("device_name", "") or "")
    is_cpu = str(facts.model.get("device", "")).startswith("cpu")
    cores = child(facts.run, "provenance").get("cpu_count")
    where = findings.place(facts.run)
    if not facts.run:
        return "the run doesn't say what it ran on"
    if not where.is_one_machine:
        return f"this run: {markdown(where.text)}"
    here = f"a CPU with {cores} cores" if is_cpu else device or "unknown hardware"
    same = cores == 16 if hardware == "cpu:16" else hardware in device.replace("-", " ").split()
    matches = same and is_cpu == (hardware == "cpu:16")
    return "" if matches else f"this run: {code(here)}" if not is_cpu else f"this run: {here}"


def _other_model(facts: Facts) -> str:
    name = str(facts.model.get("name", ""))
    return "" if EXPECTED_MODEL.lower() in name.lower() else f"expected of {EXPECTED_MODEL}"


def _other_task(facts: Facts) -> str:
    count = facts.num_experiments()
    if count != EXPECTED_EXPERIMENTS:
        return f"this run has {count} experiments"
    return _other_model(facts)


def _compared(facts: Facts, field: str) -> dict[str, float]:
    names = [] if _other_baseline(facts) else _bh(facts)
    values = {name: facts.compared(name, EXPERTS, field) for name in names}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _no_test(facts: Facts) -> str:
    notes = [str(facts.compare(name, EXPERTS).get("note") or "") for name in _bh(facts)]
    reason = next(
        (note for note in notes if note), "no standard BH configuration could be compared"
    )
    return _other_baseline(facts) or reason.rstrip(".")


def _other_baseline(facts: Facts) -> str:
    if facts.baseline == BASELINE:
        return _deviation(facts, BASELINE)
    return f"the baseline is {code(facts.baseline)}, not {code(BASELINE)}"


def _missing(value: float) -> str:
    return "" if math.isfinite(value) else "not measured in this run"


def _range(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


def _incomparable(subject: str, expected: str, measured: str, why: str) -> Line:
    return Line(
        subject=subject, expected=expected, measured=measured, verdict="not comparable", why=why
    )


def count_verdicts(lines: list[Line]) -> dict[str, Any]:
    """How many lines have each verdict."""
    return {
        verdict: sum(line.verdict == verdict for line in lines)
        for verdict in ("met", "not met", "not comparable")
    }
