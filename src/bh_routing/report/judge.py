"""Compare a run with prior expectations of BH routing (`expectations.yaml`).

A verdict is `met`, `not met` or `not comparable`; the last two always have a reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import yaml

from bh_routing.report import findings
from bh_routing.report.facts import BALANCE, EXPERTS, Facts, child
from bh_routing.report.text import MISSING, as_float, code, markdown, number, p_value, signed
from bh_routing.stats.paired import signed_rank_floor

Verdict = Literal["met", "not met", "not comparable"]
Range = tuple[float, float]


class Line(NamedTuple):
    """One expectation and this run's measurement; all strings are Markdown."""

    subject: str
    expected: str
    measured: str
    verdict: Verdict
    why: str


@cache
def expected() -> Mapping[str, Any]:
    """Return the parsed expectations."""
    text = (files("bh_routing.report") / "expectations.yaml").read_text(encoding="utf-8")
    content: Mapping[str, Any] = yaml.safe_load(text)
    return content


def compare_expectations(facts: Facts) -> list[Line]:
    """Judge all expectations, in the order of the report."""
    given = expected()
    other = _other_baseline(facts)
    reductions = list(_compared(facts, "reduction").values())
    mean = sum(reductions) / len(reductions) if reductions else math.nan
    gigabytes = as_float(facts.run.get("peak_memory_bytes")) / 1e9
    return [
        *(
            _judged(f"Experts, {code(name)}", facts.mean_of(name), ends, _deviation(facts, name))
            for name, ends in given["experts"].items()
        ),
        _p_values(facts),
        _effect_sizes(facts),
        _time(facts),
        _load(facts, "Top-K", [] if other else [given["baseline"]]),
        _load(facts, "BH", _bh(facts)),
        _judged("Experts saved, mean of the BH configurations", 100 * mean, given["saved_by_all"],
                "" if reductions else _no_test(facts), " %"),
        *(
            _judged(f"Experts saved, {code(name)}", 100 * facts.saved(name), ends,
                    other or _deviation(facts, name), " %")
            for name, ends in given["saved"].items()
        ),
        *(_duration(facts, duration) for duration in given["durations"]),
        _judged("Peak memory", gigabytes, given["memory_gb"],
                _other_model(facts) if math.isfinite(gigabytes) else "", " GB"),
    ]  # fmt: skip


def count_verdicts(lines: Iterable[Line]) -> dict[str, int]:
    """Count the lines with each verdict."""
    found = Counter(line.verdict for line in lines)
    return {verdict: found[verdict] for verdict in ("met", "not met", "not comparable")}


def judge(value: float, ends: Range, digits: int) -> tuple[Verdict, str]:
    """Compare at the displayed precision, so that the table never contradicts itself."""
    shown, (low, high) = round(value, digits), ends
    if low <= shown <= high:
        return "met", ""
    return "not met", "below the range" if shown < low else "above the range"


def _judged(subject: str, value: float, ends: Range, why_not: str, unit: str = "") -> Line:
    """Judge one number, in the unit of its range, unless it is missing or not comparable."""
    low, high = ends
    digits = 1 if unit else 2
    wanted = number(low) if low == high else f"{low} to {high}{unit}"
    if not math.isfinite(value):
        why = why_not or "not measured in this run"
        return Line(subject, wanted, MISSING, "not comparable", why)
    measured = number(value, digits) + unit
    if why_not:
        return Line(subject, wanted, measured, "not comparable", why_not)
    return Line(subject, wanted, measured, *judge(value, ends, digits))


def _p_values(facts: Facts) -> Line:
    below = expected()["p_below"]
    subject = "Difference in experts, raw p of the paired t test"
    wanted = f"p < {below:g} in every BH configuration"
    tested = _compared(facts, "p")
    if not tested:
        return Line(subject, wanted, MISSING, "not comparable", _no_test(facts))
    worst = max(tested, key=tested.__getitem__)
    why = ""
    if facts.exact_pairs:
        floor = p_value(signed_rank_floor(facts.exact_pairs))
        why = f"an exact Wilcoxon test of {facts.exact_pairs} pairs can't go below {floor}, so " \
              "the t test decides"  # fmt: skip
    untested = [name for name in _bh(facts) if name not in tested]
    if untested:
        why = "; ".join(filter(None, [f"no test for {', '.join(map(code, untested))}", why]))
    measured = f"largest: {p_value(tested[worst])} ({code(worst)})"
    is_met = tested[worst] < below and not untested
    return Line(subject, wanted, measured, "met" if is_met else "not met", why)


def _effect_sizes(facts: Facts) -> Line:
    above = expected()["cohens_d_above"]
    subject, wanted = "Cohen's d of that difference, paired", f"above {above:g} in size"
    effects = {name: abs(d) for name, d in _compared(facts, "cohens_d").items()}
    if not effects:
        return Line(subject, wanted, MISSING, "not comparable", _no_test(facts))
    least = min(effects, key=effects.__getitem__)
    measured = f"smallest: {number(effects[least], 1)} ({code(least)})"
    why = "the unit is the variation of the difference between prompts"
    return Line(subject, wanted, measured, "met" if effects[least] > above else "not met", why)


def _time(facts: Facts) -> Line:
    subject, wanted = "Generation time of BH against Top-K", "5 to 15 % longer"
    if why_not := _other_baseline(facts):
        return Line(subject, wanted, MISSING, "not comparable", why_not)
    changes = {n: 100 * c.mean for n, c in facts.time_changes.items() if n in _bh(facts)}
    if not changes:
        return Line(subject, wanted, MISSING, "not comparable", "no prompt was timed under both")
    off = _off(changes, expected()["slower"], 1)
    if off and findings.is_unsteady(facts):
        off.append("the machine's own speed was not steady")
    ends = dict.fromkeys(f"{signed(end(changes.values()), 1)} %" for end in (min, max))
    verdict: Verdict = "not met" if off else "met"
    return Line(subject, wanted, " to ".join(ends), verdict, "; ".join(off))


def _off(values: Mapping[str, float], ends: Range, digits: int) -> list[str]:
    """List the names below and above a range, as clauses."""
    reasons: dict[str, list[str]] = {}
    for name, value in values.items():
        verdict, why = judge(value, ends, digits)
        if verdict != "met":
            reasons.setdefault(why, []).append(code(name))
    return [f"{', '.join(names)} {why}" for why, names in reasons.items()]


def _load(facts: Facts, label: str, names: list[str]) -> Line:
    ends = expected()["load_cv"][label]
    subject = f"Variation (CV) of expert load, {label}"
    wanted = f"{number(ends[0])} to {number(ends[1])}"
    means = {name: facts.mean_of(name, BALANCE) for name in names}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not means:
        why_not = f"no standard {label} configuration has a value"
        return Line(subject, wanted, MISSING, "not comparable", why_not)
    off = _off(means, ends, 2)
    noise = min(facts.mean_of(name, f"{BALANCE}_noise") for name in means)
    if off and noise > ends[1]:
        off = [f"so few tokens give {number(noise)} or more by sampling noise alone, above the "
               "range"]  # fmt: skip
    shown = dict.fromkeys(number(end(means.values())) for end in (min, max))
    verdict: Verdict = "not met" if off else "met"
    return Line(subject, wanted, " to ".join(shown), verdict, "; ".join(off))


def _duration(facts: Facts, duration: Mapping[str, Any]) -> Line:
    subject = f"{expected()['experiments']} experiments on {duration['shown']}"
    minutes = as_float(child(facts.run, "timing").get("experiments_sec")) / 60.0
    why_not = _other_hardware(facts, duration) or _other_task(facts)
    return _judged(subject, minutes, duration["minutes"], why_not, " minutes")


def _bh(facts: Facts) -> list[str]:
    """Return the run's standard BH configurations that have the expected settings."""
    return [name for name in expected()["saved"] if not _deviation(facts, name)]


def _deviation(facts: Facts, name: str) -> str:
    """Return why the configuration of this name isn't the expected one; empty if it is."""
    wanted = list(map(float, expected()["shape"].values()))
    shape = [as_float(facts.model.get(key)) for key in expected()["shape"]]
    if all(map(math.isfinite, shape)) and shape != wanted:
        return (
            f"the model has {shape[0]:g} experts, top-{shape[1]:g}, not {wanted[0]:g}, "
            f"top-{wanted[1]:g}"
        )
    if name not in facts.names:
        return f"{code(name)} has no finished experiment in this run"
    for field, value in expected()["configs"][name].items():
        if (actual := facts.config(name).get(field, value)) != value:
            return f"{code(name)} has {field} {markdown(actual, 30)} here, not {value}"
    return ""


def _other_hardware(facts: Facts, duration: Mapping[str, Any]) -> str:
    if not facts.run:
        return "the run doesn't say what it ran on"
    where = findings.place(facts.run)
    if where != findings.ONE_MACHINE:
        return f"this run: {markdown(where)}"
    device = str(facts.model.get("device_name", "") or "")
    is_cpu = str(facts.model.get("device", "")).startswith("cpu")
    if is_cpu:
        cores = child(facts.run, "provenance").get("cpu_count")
        return "" if cores == duration.get("cpu_cores", "other") else (
            f"this run: a CPU with {markdown(cores)} cores"
        )  # fmt: skip
    is_same = duration.get("device") in device.replace("-", " ").split()
    return "" if is_same else f"this run: {code(device or 'unknown hardware')}"


def _other_model(facts: Facts) -> str:
    model = expected()["model"]
    name = str(facts.model.get("name", ""))
    return "" if model.lower() in name.lower() else f"expected of {model}"


def _other_task(facts: Facts) -> str:
    count = facts.num_experiments
    return _other_model(facts) if count == expected()["experiments"] else (
        f"this run has {count} experiments"
    )  # fmt: skip


def _compared(facts: Facts, field: str) -> dict[str, float]:
    names = [] if _other_baseline(facts) else _bh(facts)
    values = {name: facts.compared(name, EXPERTS, field) for name in names}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _no_test(facts: Facts) -> str:
    """Return why no BH configuration could be compared."""
    notes = [str(facts.compare(name, EXPERTS).get("note") or "") for name in _bh(facts)]
    reason = next((note for note in notes if note), "")
    why = markdown(reason.rstrip(".")) or "no standard BH configuration could be compared"
    return _other_baseline(facts) or why


def _other_baseline(facts: Facts) -> str:
    base = expected()["baseline"]
    if facts.baseline == base:
        return _deviation(facts, base)
    return f"the baseline is {code(facts.baseline)}, not {code(base)}"
