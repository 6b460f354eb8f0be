from __future__ import annotations

import html
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bh_routing.report.text import (
    code,
    for_plot,
    interval,
    latex,
    markdown,
    number,
    p_value,
    plain,
    short_labels,
    signed_percent,
    spreadsheet,
)

HOSTILE = [
    "<script>alert(1)</script>",
    "a|b|c",
    "`code` ``more``",
    "line\nbreak\r\nand\u2028more",
    "\u202eevil\u200f",
    "nul\x00bell\x07",
    "$x_1$ and $$y$$",
    "[link](javascript:alert(1)) ![image](x)",
    "# heading",
    "- list",
    "1. list",
    "> quote",
    "https://example.org @someone #12 www.example.org",
    "&lt;b&gt; &amp;",
    "*bold* _em_ ~~gone~~",
    "\\| \\",
    "x" * 10_000,
    "\ud800 lone surrogate",
    "=HYPERLINK(1)",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_stays_one_line_without_markup(text: str) -> None:
    shown = markdown(text)
    assert "\n" not in shown and "\r" not in shown
    assert "<" not in shown and ">" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*\[\]$~]", shown), shown
    assert not re.match(r"[-+=#>]|\d+[.)]\s", shown)
    assert "://" not in shown and "@someone" not in shown and "#12" not in shown
    assert all(mark not in shown for mark in "\x00\x07\u202e\u200f")


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_markdown_of_any_text_says_that_text(text: str) -> None:
    shown = markdown(text, limit=None)
    unescaped = re.sub(r"\\([\\`*\[\]|~$_\-+=#>.)])", r"\1", html.unescape(shown))
    assert unescaped == plain(text)


def test_a_long_text_is_cut_with_a_mark() -> None:
    assert plain("x" * 10_000, 50) == "x" * 49 + "…"
    assert len(html.unescape(markdown("y" * 10_000))) <= 200


def test_code_falls_back_to_escapes_where_code_could_be_broken_out_of() -> None:
    assert code("bh_strict") == "`bh_strict`"
    assert "`" not in code("a`b").replace("\\`", "")
    assert "|" not in code("a|b").replace("\\|", "")


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "  =1", "\n=1", "\x00=1"]
)
def test_a_spreadsheet_never_gets_a_formula(text: str) -> None:
    assert spreadsheet(text).startswith("'")


@given(st.text(max_size=100))
@settings(max_examples=200, deadline=None)
def test_a_spreadsheet_text_is_visible_and_no_formula(text: str) -> None:
    shown = spreadsheet(text)
    assert not shown.lstrip().startswith(("=", "+", "-", "@"))
    assert all(ord(c) >= 32 or c in "\n\t" for c in shown)


def test_a_spreadsheet_cell_is_cut_where_workbooks_end() -> None:
    shown = spreadsheet("😀" * 40_000)
    assert len(shown.encode("utf-16-le")) // 2 <= 32_767
    assert shown.endswith("…")


def test_latex_escapes_every_special_character() -> None:
    shown = latex("\\ & % $ # _ { } ~ ^ < >")
    bare = re.sub(r"\\text[a-z]+\{\}|\\[&%$#_{}]", "", shown)
    assert not re.search(r"[\\&%$#_{}~^<>]", bare)


def test_labels_stay_distinct() -> None:
    names = [f"a_very_long_configuration_name_{i}" for i in range(20)] + ["x" * 90, "x" * 91]
    labels = short_labels(names)
    assert len(set(labels)) == len(names)
    assert max(map(len, labels)) <= 22


def test_characters_without_a_glyph_become_a_box() -> None:
    assert for_plot("a漢b") == "a□b"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(None), "–"),
        (number("text"), "–"),
        (number(float("inf")), "–"),
        (number(-0.0001), "0.00"),
        (number(-1.5, 1), "−1.5"),
        (p_value(0.00049), "0.0005"),
        (p_value(0.0), "< 1e−300"),
        (p_value(3.2e-12), "3e−12"),
        (signed_percent(0.117), "+12 %"),
        (signed_percent(-0.031, 1), "−3.1 %"),
        (signed_percent(0.0), "0 %"),
        (interval(1, float("nan")), "–"),
    ],
)
def test_numbers_have_one_form(shown: str, expected: str) -> None:
    assert shown == expected
