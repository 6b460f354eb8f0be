"""Tables of results in the terminal, from a command's JSON document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def quality(document: dict[str, Any]) -> str:
    """Return the terminal's table: experts and loss of quality per configuration."""
    rows = document["rules"]
    width = max(len(row["config_name"]) for row in rows)
    lines = [
        f"{'configuration':{max(width, 13)}}  experts   ΔNLL (95 % interval)        "
        "perplexity   KL mean    p99   same top-1   verdict"
    ]
    for row in rows:
        lines.append(
            f"{row['config_name']:{max(width, 13)}}  {_number(row['mean_experts'], '7.2f')}  "
            f"{_number(row['delta_nll'], '+8.4f')} ({_number(row['delta_nll_low'], '+.4f')} to "
            f"{_number(row['delta_nll_high'], '+.4f')})  "
            f"{_percent(row['perplexity_ratio'])}  {_number(row['kl_mean'], '8.4f')} "
            f"{_number(row['kl_p99'], '6.3f')}   {_number(row['same_top1_share'], '10.1%')}   "
            f"{row['verdict']}"
        )
    first = rows[0]
    lines.append(
        f"{first['tokens']:,} tokens of {first['documents']} documents in {first['clusters']} "
        f"clusters; windows of {document['window']}, stride {document['stride']}; a document's "
        "first token is scored after an end-of-text token. ΔNLL in nats per token against the "
        f"model's own top-k; margin {document['margin']:.4f}."
    )
    lines += document["notes"]
    lines += [f"{row['config_name']}: {row['note']}" for row in rows if row["note"]]
    return "\n".join(lines)


def _percent(ratio: float | None) -> str:
    return "       n/a" if ratio is None else f"{100 * (ratio - 1):+9.2f} %"


def tasks(document: dict[str, Any]) -> str:
    """Return one block per metric of a task: experts, score, and change of score."""
    comparisons = {
        (c["task"], c["filter"], c["metric"], c["config_name"]): c for c in document["comparisons"]
    }
    blocks: dict[tuple[str, str, str], list[str]] = {}
    notes: dict[str, None] = {}
    width = max(13, *(len(name) for name in document["configs"]))
    for run in document["runs"]:
        for score in run["scores"]:
            key = (score["task"], score["filter"], score["metric"])
            found = comparisons.get((*key, run["config_name"]))
            block = blocks.setdefault(key, [_header(score, width)])
            block.append(_row(run, score, found, width))
            if found and found["note"]:
                notes[f"{score['task']}: {found['note']}"] = None
    lines = [line for block in blocks.values() for line in [*block, ""]]
    lines.append(
        f"Differences from {document['reference']} with 95 % intervals, item by item; of a "
        "perplexity or of bits per byte, the difference in log-likelihood, nats per item, word or "
        "byte. p: exact McNemar where answers are right or wrong, corrected by Holm over "
        "configurations. Experts: mean over real tokens and layers of the task's forward passes."
    )
    return "\n".join([*lines, *notes])


def _header(score: dict[str, Any], width: int) -> str:
    title = f"{score['task']} {score['metric']}"
    suffix = "" if score["filter"] == "none" else f", filter {score['filter']}"
    return (
        f"{title}{suffix}, {score['num_items']} items\n"
        f"  {'configuration':{width}}  experts      score   difference (95 % interval)"
        "       gained  lost  p (Holm)"
    )


def _row(
    run: dict[str, Any], score: dict[str, Any], found: dict[str, Any] | None, width: int
) -> str:
    start = (
        f"  {run['config_name']:{width}}  {_number(run['mean_experts'], '7.2f')}  "
        f"{score['value']:9.4f}"
    )
    if found is None:
        return start
    interval = f"({_number(found['low'], '+.4f')} to {_number(found['high'], '+.4f')})"
    return (
        f"{start}   {_number(found['difference'], '+.4f')} {interval:20}"
        f"  {_number(found['gained'], '6d'):>6} {_number(found['lost'], '5d'):>5}"
        f"  {_p(found['p_corrected']):>8}"
    )


def _p(value: float | None) -> str:
    return "<0.0001" if value is not None and value < 0.0001 else _number(value, ".4f")


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def speeds(document: dict[str, Any]) -> str:
    """Return the facts of a measurement, a line each, and its rows."""
    facts = [f"{key}: {_cell(value)}" for key, value in document.items() if key != "rows"]
    return "\n".join([*facts, aligned(document["rows"], str.rjust)])


def aligned(rows: list[dict[str, Any]], justify: Callable[[str, int], str] = str.ljust) -> str:
    """Return rows aligned in columns."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(justify, line, widths)).rstrip() for line in cells]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case list():
            return "; ".join(map(str, value))
        case {"median": median, "low": low, "high": high}:
            return f"{median:.4g} ({low:.4g} to {high:.4g})"
    return str(value)
