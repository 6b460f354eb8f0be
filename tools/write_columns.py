"""Write docs/columns.md from the record's own definitions: `python tools/write_columns.py`."""

from __future__ import annotations

from pathlib import Path

from bh_routing.records import RESULTS_CSV, column_definitions

TARGET = Path(__file__).parents[1] / "docs" / "columns.md"


def render() -> str:
    """The table of every column, in the CSV's order."""
    lines = [
        f"# Columns of `{RESULTS_CSV}`",
        "",
        "One row an experiment: one configuration on one prompt. A *unit* of the expert columns is",
        "one (token, layer) pair, over the prompt's tokens and the generated tokens that were fed",
        "back (all but the last). Generated from `src/bh_routing/records.py` by",
        "`python tools/write_columns.py`.",
        "",
        "| column | definition |",
        "|---|---|",
        *(f"| `{name}` | {text} |" for name, text in column_definitions().items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
