"""`bh-routing models`: supported families of models, and a check of one model's routers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bh_routing.cli.console import console_log

if TYPE_CHECKING:
    from bh_routing.models.sites import RouterSite


def models(
    check: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Load this model (`demo`, a folder or a Hugging Face id), probe its routers and "
            "report the findings.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="With --check: auto, cuda or cpu.")] = "auto",
    no_fp16: Annotated[
        bool, typer.Option("--no-fp16", help="With --check: float32 in place of bfloat16.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to stdout.")] = False,
) -> int:
    """List the families of models that can be routed, or check one model."""
    with console_log():
        rows = _families() if check is None else _check(check, device, no_fp16)
    typer.echo(json.dumps(rows, indent=2) if as_json else _table(rows))
    return 0


def _families() -> list[dict[str, Any]]:
    from bh_routing.models.families import family_rows

    return [dict(row) for row in family_rows()]


def _check(name: str, device: str, no_fp16: bool) -> list[dict[str, Any]]:
    from bh_routing.models.load import load_model
    from bh_routing.models.routers import find_routers

    dtype = "float32" if no_fp16 else "auto"
    loaded = load_model(name, device=device, dtype=dtype)  # type: ignore[arg-type]
    return [_row(site) for site in find_routers(loaded.model).sites]


def _row(site: RouterSite) -> dict[str, Any]:
    from bh_routing.models.families import describe_facts, describe_limits

    facts = site.facts
    return {
        "router": site.name,
        "experts": facts.num_experts,
        "top_k": facts.top_k,
        "most": facts.most_slots,
        "scale": None if facts.scale is None else round(facts.scale, 3),
        "sorted": facts.is_sorted,
        "how": describe_facts(facts),
        "limits": describe_limits(facts),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """Return rows aligned in columns."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return "" if value is None else str(value)
