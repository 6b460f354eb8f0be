"""Write EVIDENCE.md: conclusions and tables of the protocol, of one model or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from bh_routing.analysis.evidence import REFERENCE_SCORE, collect_evidence
from bh_routing.report.text import as_float, code, loss_percent, markdown, number, percent
from bh_routing.results.files import render_json, write_bytes, write_text
from bh_routing.results.records import EVIDENCE_JSON, EVIDENCE_MD

Evidence = Mapping[str, Any]
"""Collected evidence of one model."""
Row = tuple[tuple[str, ...], tuple[str, ...]]
"""Keys and cells of a row of a table."""

POPULATION: Final = "contribution_threshold-sensitivity (= population BH)"
REFERENCES: Final = {
    "top_k": "static top-k",
    "top_p": "top-p",
    "bh_drop": "`bh_drop` per token",
    "oea": "OEA",
    "expert_budget": "the budget by gate mass",
}
STEPS: Final = "bh_drop-step_population-sensitivity-refill-"
"""Beginning of a variant's name; a number of slots follows."""
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
LEGEND: Final = (
    "A case is a budget, an α or a size. Percentages of comparisons are the fraction of the "
    "reference's increase in perplexity that the rule saves at its own cost, with joint 95 % "
    "intervals; for pruning they are the increase in perplexity. A case that is neither shown nor "
    "refuted doesn't count as holding."
)


class Finding(NamedTuple):
    """One case of a claim on one model."""

    shown: str
    verdict: str


Claim = Callable[[Evidence], list[Finding]]


def conclude_evidence(folder: Path) -> list[Path]:
    """Write evidence.json and EVIDENCE.md of an evidence folder.

    Raises:
        ResultsError: the folder isn't one, or a file is damaged.
    """
    found = collect_evidence(folder)
    name = str(found["protocol"]["model"])
    return [
        write_bytes(folder / EVIDENCE_JSON, render_json(found)),
        write_text(
            folder / EVIDENCE_MD,
            f"# Evidence: {markdown(name)}\n\n{render_evidence({name: found})}",
        ),
    ]


def render_evidence(models: Mapping[str, Evidence]) -> str:
    """Render the conclusions and tables of models, by the names to show, as Markdown."""
    failures = [
        f"- {markdown(name)}: `{part}` {_state(outcome)}"
        for name, found in models.items()
        for part, outcome in found["parts"].items()
        if outcome is None or outcome["reason"] is not None
    ]
    sections = {
        "The models": [*_facts(models), *([""] if failures else []), *failures],
        "Conclusions": [*_conclusions(models), "", LEGEND],
        **{title: _side_by_side(models, *table) for title, table in TABLES.items()},
    }
    shown = (f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines)
    return "\n\n".join(shown) + "\n"


def _state(outcome: Mapping[str, Any] | None) -> str:
    return "wasn't run" if outcome is None else f"failed: {markdown(outcome['reason'])}"


def _side_by_side(
    models: Mapping[str, Evidence],
    keys: Sequence[str],
    cells: Sequence[str],
    rows_of: Callable[[Evidence], Iterator[Row]],
) -> list[str]:
    """Return the lines of a table with the cells of each model next to each other."""
    found = {name: dict(rows_of(own)) for name, own in models.items()}
    found = {name: rows for name, rows in found.items() if rows}
    order = dict.fromkeys(key for rows in found.values() for key in rows)
    prefix = len(models) > 1
    heads = [f"{name}: {cell}" if prefix else cell for name in found for cell in cells]
    none = ("–",) * len(cells)
    if not order:
        return []
    lines = [[*keys, *heads], [":--"] * len(keys) + ["--:"] * len(heads)]
    for key in order:
        lines.append([*key, *(c for rows in found.values() for c in rows.get(key, none))])
    return [f"| {' | '.join(line)} |" for line in lines]


def _facts(models: Mapping[str, Evidence]) -> list[str]:
    def rows(found: Evidence) -> Iterator[Row]:
        model, made, own = found["model"], found["provenance"], found["protocol"]
        if not model:
            return
        done = {p: o["seconds"] for p, o in found["parts"].items() if o and o["seconds"]}
        minutes = ", ".join(f"{part} {seconds / 60:.1f}" for part, seconds in done.items())
        yield ("model",), (markdown(own["model"]),)
        yield ("parameters",), (f"{model['num_parameters'] / 1e6:,.1f} million",)
        shape = f"{model['num_layers']} × {model['num_experts']}, top-{model['model_top_k']}"
        yield ("layers × experts",), (shape,)
        yield ("scored tokens",), (f"{found['scored_tokens']:,}",)
        yield ("calibration tokens",), (f"{own['calibration_tokens']:,}",)
        yield ("dtype, machine",), (f"{model['dtype']}, {markdown(model['device_name'])}",)
        versions = ", ".join(f"{n} {made[n]}" for n in ("bh_routing", "torch", "transformers"))
        yield ("versions, seed",), (f"{markdown(versions)}, {made['seed']}",)
        yield ("date",), (made["started_at"][:10],)
        yield ("minutes",), (minutes or "–",)
        yield ("made by",), (found.get("source", "`bh-routing evidence`"),)

    return _side_by_side({**models}, [""], ["value"], rows)


def _change(row: Mapping[str, Any]) -> str:
    """Return a loss as a change of perplexity, with its interval."""
    ends = [as_float(row[name]) for name in ("delta_nll_low", "delta_nll_high")]
    shown = loss_percent(math.exp(as_float(row["delta_nll"])))
    if not all(map(math.isfinite, ends)):
        return shown
    low, high = (number(100 * math.expm1(end), 1) for end in ends)
    return f"{shown} ({low} to {high})"


def _saved(row: Mapping[str, Any] | None) -> str:
    """Return the fraction of a reference's loss that a rule saves, with its interval and answer."""
    if row is None or row["saved"] is None:
        return "–"
    shown = percent(row["saved"])
    if row["saved_low"] is not None:
        ends = (number(100 * row[name], 0) for name in ("saved_low", "saved_high"))
        shown += f" [{', '.join(ends)}]"
    return shown if row["answer"] in ("yes", "unknown") else f"{shown} ({row['answer']})"


def _against(table: Evidence, point: Mapping[str, Any], reference: str) -> dict[str, Any] | None:
    key = (point["variant"], point["budget"], reference)
    rows = (r for r in table["comparisons"] if (r["variant"], r["budget"], r["reference"]) == key)
    return next(rows, None)


def _budget(found: Evidence, part: str, budget: float) -> str:
    if part == "decode_steps":
        return percent(budget)
    return f"{number(budget, 2).rstrip('0').rstrip('.')} of {found['model']['model_top_k']}"


def _points(found: Evidence, part: str, references: Sequence[str], cost: str) -> Iterator[Row]:
    table = found.get(part, {"points": []})
    for point in sorted(table["points"], key=lambda point: -point["budget"]):
        key = (_budget(found, part, point["budget"]), code(point["variant"], 80))
        saved = (_saved(_against(table, point, reference)) for reference in references)
        if point["delta_nll"] is not None:
            yield key, (number(point[cost]), _change(point), *saved)


def _equal_cost(found: Evidence) -> Iterator[Row]:
    return _points(found, "equal_cost", ("top_k", "top_p"), "mean_experts")


def _decode_steps(found: Evidence) -> Iterator[Row]:
    return _points(found, "decode_steps", ("top_k", "oea"), "mean_distinct_experts")


def _static(found: Evidence) -> Iterator[Row]:
    for row in found.get("nulls", {"rules": []})["rules"]:
        if row["config_name"].startswith("top_k | "):
            k, own_k = float(row["config_name"].rpartition(" ")[2]), found["model"]["model_top_k"]
            yield (number(k / own_k, 3),), (number(row["perplexity"], 3), _change(row))


def _nulls(found: Evidence) -> Iterator[Row]:
    table = found.get("nulls", {"rules": [], "out_of_reach": {}})
    for row in table["rules"]:
        rule, _, at = row["config_name"].partition(" | ")
        if rule != "top_k":
            ends = " to ".join(number(row[f"delta_nll_{end}"], 3) for end in ("low", "high"))
            loss = f"{number(row['delta_nll'], 3)} ({ends})"
            yield (rule, at), (number(row["mean_experts"]), loss, number(row["static"], 3))
    for name in table["out_of_reach"]:
        rule, _, at = name.partition(" | ")
        yield (rule, at), ("out of reach", "–", "–")


def _wrong_drops(found: Evidence) -> Iterator[Row]:
    for row in found.get("wrong_drops", []):
        is_drop = row["variant"].startswith("bh_drop")
        if is_drop and "sensitivity" not in row["variant"]:
            continue  # evidence.json has these rows
        bound = percent(row["alpha"] * row["share_mattered"], 1) if is_drop else "–"
        cells = (number(row["mean_experts"]), _fraction(row["per_token"]), bound)
        yield (row["variant"], f"{row['alpha']:g}"), cells


def _fraction(value: Mapping[str, Any]) -> str:
    if value["estimate"] is None:
        return "–"
    ends = " to ".join(number(100 * as_float(value[end]), 1) for end in ("low", "high"))
    return f"{percent(value['estimate'], 1)} ({ends})"


def _pruning(found: Evidence) -> Iterator[Row]:
    for row in found.get("pruning", []):
        answer = "–" if row["score"] == REFERENCE_SCORE else row["answer"]
        yield (percent(row["fraction"], 1), code(row["score"])), (_change(row), answer)


def matches(name: str, variant: str) -> bool:
    """Return whether a variant has this name, or begins with it if that ends in a hyphen."""
    return name.startswith(variant) if variant.endswith("-") else name == variant


def _judge(answer: str, expected: str = "yes") -> str:
    """Return the verdict of a claim, given whether a rule has a lower loss than a reference."""
    if answer not in ("yes", "no"):
        return UNDECIDED
    return HOLDS if answer == expected else FAILS


def _compared(part: str, variant: str, reference: str, expected: str = "yes") -> Claim:
    """Return a claim that a variant has a lower or higher loss than a reference at each budget."""

    def claim(found: Evidence) -> list[Finding]:
        table = found.get(part, {"points": [], "comparisons": []})
        points = [p for p in table["points"] if matches(p["variant"], variant)]
        rows = [_against(table, p, reference) for p in sorted(points, key=lambda p: -p["budget"])]
        return [
            Finding(
                _saved({**row, "answer": "yes"}),
                _judge(row["answer"], expected),
            )
            for row in rows
            if row is not None and row["answer"] != "unknown"
        ]

    return claim


def _answered(begin: str, expected: str) -> Claim:
    """Return a claim on the rules of the null ablation against static top-k at their means."""

    def claim(found: Evidence) -> list[Finding]:
        rows = [
            row
            for row in found.get("nulls", {"rules": []})["rules"]
            if row["config_name"].startswith(begin) and row["answer"] != "unknown"
        ]
        return [Finding("", _judge(row["answer"], expected)) for row in rows]

    return claim


def _bounded(found: Evidence) -> list[Finding]:
    """Return whether BH-drop per token keeps its mean fraction of wrong drops below α·π₀."""
    rows = [r for r in found.get("wrong_drops", []) if r["variant"].startswith("bh_drop token")]
    findings = []
    for row in rows:
        low, high = (as_float(row["per_token"][end]) for end in ("low", "high"))
        bound = row["alpha"] * row["share_mattered"]
        within = HOLDS if high <= bound else UNDECIDED
        findings.append(Finding("", FAILS if low > bound else within))
    return findings


def _fisher_against_reap(found: Evidence) -> list[Finding]:
    return [
        Finding(_change(row), _judge(row["answer"]))
        for row in found.get("pruning", [])
        if row["score"] == "fisher_mass"
    ]


TABLES: Final[Mapping[str, tuple[list[str], list[str], Callable[[Evidence], Iterator[Row]]]]] = {
    "Rules at equal experts per token": (
        ["budget", "rule"],
        ["experts", "Δ perplexity, 95 %", "saved of static top-k's", "of top-p's"],
        _equal_cost,
    ),
    "Rules at equal reads of a decode step of 16 sequences": (
        ["reads", "rule"],
        ["experts read", "Δ perplexity, 95 %", "saved of static top-k's", "of OEA's"],
        _decode_steps,
    ),
    "Static top-k": (["k / own k"], ["perplexity", "Δ perplexity, 95 %"], _static),
    "Null distributions": (
        ["rule and null", "tuning parameter"],
        ["experts", "ΔNLL, 95 %", "static top-k there"],
        _nulls,
    ),
    "Dropped slots that mattered": (
        ["rule", "α"],
        ["experts", "wrong per token, 95 %", "α·π₀"],
        _wrong_drops,
    ),
    "Pruned checkpoints": (
        ["experts kept", "score"],
        ["Δ perplexity, 95 %", "less than `reap`"],
        _pruning,
    ),
}
"""Title -> keys, cells and rows of a table."""
CLAIMS: Final[Mapping[str, Claim]] = {
    "Population BH has a lower loss than static top-k at equal experts per token":
        _compared("equal_cost", POPULATION, "top_k"),
    "`bh_drop` per token has a lower loss than static top-k":
        _compared("equal_cost", "bh_drop-sensitivity", "top_k"),
    "Population BH has a lower loss than top-p": _compared("equal_cost", POPULATION, "top_p"),
    "Top-p has a lower loss than static top-k": _compared("equal_cost", "top_p", "top_k"),
    "BH-select (`bh`) has a higher loss than static top-k":
        _compared("equal_cost", "bh", "top_k", "no"),
    **{
        f"Per step of 16, `bh_drop` step_population, refilled, has a lower loss than {shown}":
            _compared("decode_steps", STEPS, reference)
        for reference, shown in REFERENCES.items() if reference != "top_p"
    },
    "BH-select has a higher loss than static top-k at its mean, for every null distribution and α":
        _answered("bh, ", "no"),
    "`bh_drop` has a lower loss than static top-k at its mean, at every α":
        _answered("bh_drop", "yes"),
    "`bh_drop` per token: of a token's drops, at most α·π₀ mattered on average": _bounded,
    "Pruned by Fisher mass, a model has a lower loss than by REAP": _fisher_against_reap,
}  # fmt: skip
"""Claims of README and docs/method.md, each with its cases on a model."""


def _conclusions(models: Mapping[str, Evidence]) -> list[str]:
    def rows(found: Evidence) -> Iterator[Row]:
        for text, claim in CLAIMS.items():
            findings = claim(found)
            if findings:
                yield (text,), (_tally(findings),)

    lines = _side_by_side(models, ["conclusion"], ["cases in which it holds"], rows)
    if len(models) == 1 or not lines:
        return lines
    heads = [f"{lines[0]} survives |", f"{lines[1]}:--|"]
    verdicts = [[_verdict(claim(found)) for found in models.values()] for claim in CLAIMS.values()]
    shown = [text for text, own in zip(CLAIMS, verdicts, strict=True) if any(own)]
    kept = [own for own in verdicts if any(own)]
    assert len(shown) == len(lines) - 2
    return heads + [f"{line} {_survives(own)} |" for line, own in zip(lines[2:], kept, strict=True)]


def _tally(findings: Sequence[Finding]) -> str:
    holding = sum(finding.verdict == HOLDS for finding in findings)
    failing = sum(finding.verdict == FAILS for finding in findings)
    text = f"{holding} of {len(findings)}"
    text += f", the opposite in {failing}" if failing else ""
    shown = "; ".join(finding.shown for finding in findings if finding.shown)
    return f"{text}: {shown}" if shown else text


def _verdict(findings: Sequence[Finding]) -> str:
    """Return a claim's verdict on a model; empty without a case."""
    verdicts = {finding.verdict for finding in findings}
    if FAILS in verdicts:
        return FAILS
    return UNDECIDED if UNDECIDED in verdicts else HOLDS if verdicts else ""


def _survives(verdicts: Sequence[str]) -> str:
    if "" in verdicts:
        return "not measured"
    if set(verdicts) == {HOLDS}:
        return "**yes**"
    return "no" if FAILS in verdicts else "undecided"
