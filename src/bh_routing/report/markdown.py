"""Render REPORT.md from templates: findings, tables, plots, tests and limitations of a run.

Templates contain the sentences, findings the numbers. All output of a template is escaped for
Markdown unless a filter of this module made it: texts of users and models are data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import pandas as pd
from jinja2 import ChainableUndefined, Environment, PackageLoader, Undefined
from markupsafe import Markup

from bh_routing.report import findings, text
from bh_routing.report.facts import BALANCE, EXPERTS, METRICS, SECONDS, SPEED, Facts, read_facts
from bh_routing.report.judge import compare_expectations, count_verdicts
from bh_routing.report.sweep_findings import batch_advice, budgets_of, series_label
from bh_routing.report.text import MISSING, as_float
from bh_routing.results.files import write_text
from bh_routing.results.records import LEFT_OUT, REPORT_MD
from bh_routing.stats.paired import signed_rank_floor

RULE_FIELDS: Final = (
    "alpha", "null", "temperature", "min_k", "max_k", "k", "procedure", "on_empty", "weights",
)  # fmt: skip
LISTED: Final = 6
"""Above this number, configurations are counted instead of listed."""


def generate_markdown_report(
    results: pd.DataFrame, summary: dict[str, Any], output_dir: str | Path
) -> Path:
    """Write REPORT.md into `output_dir`.

    Args:
        results: rows as in `bh_routing_results.csv`.
        summary: return value of `analyze_results`; missing numbers are shown as a dash.
        output_dir: results folder; its run.json and records.jsonl are used if present.
    Returns:
        Path of the report.
    Raises:
        InputError: a required column is missing.
    """
    return write_report(read_facts(results, summary, Path(output_dir)))


def write_report(facts: Facts) -> Path:
    """Write REPORT.md into the folder of a run."""
    return write_text(facts.folder / REPORT_MD, render("REPORT.md.j2", **context(facts)))


def context(facts: Facts) -> dict[str, Any]:
    """Return the variables of a run's templates."""
    lines = compare_expectations(facts)
    tally = ", ".join(f"{count} {verdict}" for verdict, count in count_verdicts(lines).items())
    return {
        "facts": facts,
        "run": facts.run,
        "quality": facts.quality,
        "findings": findings,
        "batches": batch_advice(facts),
        "failed": facts.failures,
        "expectations": lines,
        "tally": tally,
        "LEFT_OUT": LEFT_OUT,
        "METRICS": METRICS,
        "RULE_FIELDS": RULE_FIELDS,
        "EXPERTS": EXPERTS,
        "SECONDS": SECONDS,
        "SPEED": SPEED,
        "BALANCE": BALANCE,
    }


def render(template: str, **values: Any) -> str:
    """Fill a template and join wrapped lines, so that each paragraph is one line."""
    return flow(_environment().get_template(template).render(values))


def flow(rendered: str) -> str:
    """Join the lines of each paragraph and list item; tables, headings and code are unchanged.

    Empty list items are dropped.

    Example:
        >>> flow("- a\\n  b\\n- \\n\\n\\n\\n| x |\\n| y |")
        '- a b\\n\\n| x |\\n| y |\\n'
    """
    text = ""
    for block in re.split(r"\n\s*\n", rendered):
        lines: list[str] = []
        for line in filter(lambda line: line.strip() not in ("", "-"), block.split("\n")):
            is_new = line.startswith(("|", "#", "- ", "    ", "!["))
            if is_new or not lines or lines[-1].startswith(("|", "#")):
                lines.append(line.rstrip())
            else:
                space = "" if line.strip()[0] in ".,;:" else " "
                lines[-1] += space + line.strip()
        if lines:
            is_same_list = lines[0].startswith("- ") and text.rpartition("\n")[2].startswith("- ")
            text += ("\n" if is_same_list else "\n\n") * bool(text) + "\n".join(lines)
    return text + "\n"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bh_routing.report"),
        autoescape=True,
        finalize=_escaped,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"findings": findings, "signed_rank_floor": signed_rank_floor}
    environment.tests["known"] = _is_known
    environment.filters |= {name: _safe(function) for name, function in _FILTERS.items()}
    environment.filters |= {"known": _is_known, "verb": _verb, "series": series_label}
    return environment


def _escaped(value: Any) -> Any:
    """Escape values that no filter made; undefined names raise instead of printing nothing."""
    if isinstance(value, Undefined):
        value._fail_with_undefined_error()
    return value if isinstance(value, Markup) else Markup(text.markdown(value))


def _safe(function: Callable[..., str]) -> Callable[..., Markup]:
    """Make a filter whose result is already Markdown; a missing key counts as no value."""

    def call(value: Any, *arguments: Any) -> Markup:
        known = [None if isinstance(given, Undefined) else given for given in (value, *arguments)]
        return Markup(function(*known))

    return call


def _is_known(value: Any) -> bool:
    return not isinstance(value, Undefined) and math.isfinite(as_float(value))


def _names(rows: Iterable[Any]) -> str:
    return text.listed(text.code(row.config_name) for row in rows)


def _some(names: Sequence[str]) -> str:
    if len(names) > LISTED:
        return f"{len(names)} configurations"
    return text.listed(map(text.code, names))


def _verb(items: Sequence[Any], one: str, more: str) -> str:
    return one if len(items) == 1 else more


def _clauses(rendered: str) -> list[str]:
    """Split a filtered block into its clauses, each of which ends with a marker."""
    clauses = (" ".join(clause.split()) for clause in re.split("[¦‖]", rendered))
    return [clause for clause in clauses if clause and clause != MISSING]


def _fewer(fraction: float) -> str:
    shown = text.percent(abs(fraction))
    if shown == text.percent(0):
        return "as many"
    return f"{shown} {'fewer' if fraction >= 0 else 'more'}"


def _parameters(count: object) -> str:
    number = as_float(count)
    if not math.isfinite(number):
        return ""
    is_big = number >= 1e9
    unit = "billion" if is_big else "million"
    return f"{text.number(number / (1e9 if is_big else 1e6), 1)} {unit} parameters"


def _formatted(value: object, form: str) -> str:
    number = as_float(value)
    return f"{number:{form}}" if math.isfinite(number) else MISSING


def _times(ratio: object) -> str:
    shown = text.number(ratio, 1)
    return shown if shown == MISSING else f"{shown}×"


_FILTERS: Final[Mapping[str, Callable[..., str]]] = {
    "category": lambda name: text.markdown(name, 30) or "(none)",
    "chain": lambda rendered: "; ".join(_clauses(rendered)),
    "change": text.signed_percent,
    "code": text.code,
    "count": lambda value: _formatted(value, ",.0f"),
    "detectable": lambda d: text.loss_percent(math.exp(d)) if as_float(d) > 0 else MISSING,
    "ends": lambda low, high: text.interval(100 * (low - 1), 100 * (high - 1), 1),
    "fewer": _fewer,
    "budgets": budgets_of,
    "general": lambda value, digits=6: _formatted(value, f".{digits}g"),
    "interval": text.interval,
    "interval_percent": lambda low, high, digits=0: text.interval(
        100 * as_float(low), 100 * as_float(high), digits
    ),
    "joined": lambda rendered: ", ".join(_clauses(rendered)),
    "listed": lambda rendered: text.listed(_clauses(rendered)),
    "loss": text.loss_percent,
    "margin": lambda nats: text.signed_percent(math.expm1(nats), 1),
    "md": lambda value, *limit: text.markdown(value, *limit) or MISSING,
    "names": _names,
    "number": text.number,
    "p": text.p_value,
    "parameters": _parameters,
    "percent": text.percent,
    "short": lambda v: f"{v:g}" if isinstance(v, float) else text.markdown(v, 40),
    "signed": text.signed,
    "verbatim": str,
    "some": _some,
    "times": _times,
}
