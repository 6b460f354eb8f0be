"""Pieces of Markdown: tables, lists, pictures, sections without anything in them left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bh_routing.records import PLOTS


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers, aligned right.

    Example:
        >>> print(table(["name", "n"], [["a", "1"]]))
        | name | n |
        |:--|--:|
        | a | 1 |
    """
    return text_table(header, rows, align=[":--"] + ["--:"] * (len(header) - 1))


def text_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], align: Sequence[str] | None = None
) -> str:
    """A table of texts, aligned left unless told otherwise; the cells are Markdown already."""
    marks = align or [":--"] * len(header)
    lines = [_line(header), "|" + "|".join(marks) + "|", *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def bullets(items: Iterable[str]) -> str:
    """A list; empty text for no items."""
    return "\n".join(f"- {item}" for item in items)


def picture(name: str, description: str) -> str:
    """A plot of the run, by its path relative to the report."""
    return f"![{description}]({PLOTS}/{name})"


def section(title: str, *parts: str) -> str:
    """A heading with its paragraphs; nothing at all if every paragraph is empty."""
    body = [part for part in parts if part]
    return "\n\n".join([f"## {title}", *body]) if body else ""
