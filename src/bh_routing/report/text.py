"""Escape and format any text for plots, Markdown, LaTeX and spreadsheets.

Prompts and generated texts are arbitrary: markup, control characters, right-to-left marks, ten
thousand characters. They are data here and never become structure.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, get_font

CUT_MARK = "…"
MISSING = "–"

# Markup inside a line: emphasis, code, links, tables, strikethrough, formulas.
_MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
# Markup at the start of a line: lists, headings, quotes, rules.
_MARKDOWN_START = re.compile(r"^(?:[-+=#>]|\d{1,9}(?=[.)](?:\s|$)))")
# GitHub links addresses, mentions and issue numbers automatically; backslashes don't prevent it.
_AUTOLINK = re.compile(r"@(?=\w)|:(?=//)|(?<=www)\.|#(?=\d)", re.IGNORECASE)
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
}
_LINE_BREAKS = re.compile(r"[\r\n\t\v\f\x1c-\x1e\x85\u2028\u2029]+")
_FORMULA_START = ("=", "+", "-", "@", "\t", "\r", "\n", "|", "%", "＝", "＋", "－", "＠")
_SPREADSHEET_CELL = 32_767  # UTF-16 code units per cell


def plain(text: object, limit: int | None = None) -> str:
    """Return one line of visible characters, truncated with an ellipsis at `limit`.

    Line breaks become spaces; control characters, direction marks, unpaired surrogates and
    unassigned code points are dropped.

    Example:
        >>> plain("a\\nb\\x00c\\u202ed", limit=4)
        'a b…'
    """
    line = _LINE_BREAKS.sub(" ", "" if text is None else str(text))
    kept = "".join(c for c in line if unicodedata.category(c)[0] != "C")
    return cut(kept.strip(), limit)


def cut(text: str, limit: int | None) -> str:
    """Truncate a text to `limit` characters, the last of which is then an ellipsis."""
    if limit is None or len(text) <= limit:
        return text
    return text[: max(limit - len(CUT_MARK), 0)].rstrip() + CUT_MARK


def cut_middle(text: str, limit: int) -> str:
    """Shorten a name in the middle, since the names of a series differ at the end.

    Example:
        >>> cut_middle("a_long_name_1", 7)
        'a_l…e_1'
    """
    half = (limit - len(CUT_MARK)) // 2
    return text if len(text) <= limit else text[:half] + CUT_MARK + text[-half:]


def markdown(text: object, limit: int | None = 200) -> str:
    """Escape a text, including HTML, for one line or one table cell of Markdown.

    Example:
        >>> markdown("a|b <script>")
        'a\\\\|b &lt;script&gt;'
    """
    line = _MARKDOWN.sub(lambda found: "\\" + found[0], plain(text, limit))
    line = _AUTOLINK.sub(lambda found: f"&#{ord(found[0])};", html.escape(line, quote=False))
    return _MARKDOWN_START.sub(_escape_start, line)


def _escape_start(found: re.Match[str]) -> str:
    first = found[0]
    return first + "\\" if first.isdigit() else "\\" + first


def code(text: object, limit: int | None = 60) -> str:
    """Format a name as Markdown code, or as escaped text if code can't represent it.

    Example:
        >>> code("bh_strict")
        '`bh_strict`'
    """
    line = plain(text, limit)
    if not line:
        return MISSING
    if re.search(r"[`|<>\\$&]", line):
        return markdown(line, limit)
    return f"`{line}`"


def latex(text: object, limit: int | None = 200) -> str:
    """Escape a text for LaTeX.

    Example:
        >>> latex("50 % of $x_1$")
        '50 \\\\% of \\\\$x\\\\_1\\\\$'
    """
    return "".join(_LATEX.get(c, c) for c in plain(text, limit))


def spreadsheet(text: object) -> str:
    """Escape a text so that a spreadsheet never runs it, without control characters.

    A text that begins like a formula is prefixed with an apostrophe, also after leading blanks,
    because programs strip those.

    Example:
        >>> spreadsheet("=1+1"), spreadsheet("plain")
        ("'=1+1", 'plain')
    """
    raw = "" if text is None else str(text)
    shown = "".join(
        c for c in raw if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cn", "Cf")
    )
    risky = raw.startswith(_FORMULA_START) or shown.lstrip(" \n\t\xa0").startswith(_FORMULA_START)
    units = ("'" + shown if risky else shown).encode("utf-16-le")
    whole = units[: 2 * _SPREADSHEET_CELL].decode("utf-16-le", errors="ignore")
    return whole if len(units) <= 2 * _SPREADSHEET_CELL else whole[:-1] + CUT_MARK


def for_plot(text: object, limit: int | None = None) -> str:
    """Return one line that the plot font can draw; other characters become boxes."""
    return "".join(c if ord(c) in _drawable() else "□" for c in plain(text, limit))


@cache
def _drawable() -> frozenset[int]:
    """Return the code points of matplotlib's bundled font."""
    return frozenset(get_font(findfont(FontProperties(family=["DejaVu Sans"]))).get_charmap())


def short_labels(names: Sequence[str], limit: int = 22) -> list[str]:
    """Shorten names for an axis, kept distinct by their ends or else by a number.

    Example:
        >>> short_labels(["a_long_name_1", "a_long_name_2", "b"], limit=7)
        ['a_l…e_1', 'a_l…e_2', 'b']
    """
    shown = [for_plot(name) or "(no name)" for name in names]
    fronts = [cut(name, limit) for name in shown]
    labels = [
        cut_middle(name, limit) if fronts.count(front) > 1 else front
        for name, front in zip(shown, fronts, strict=True)
    ]
    for index, label in enumerate(list(labels)):
        if labels.count(label) > 1 or labels.index(label) < index:
            suffix = f" ({index + 1})"
            labels[index] = cut(label, limit - len(suffix)) + suffix
    return labels


def number(value: object, digits: int = 2) -> str:
    """Format a finite number with fixed decimals, and anything else as a dash.

    Example:
        >>> number(3.14159), number(float("nan")), number(-0.001)
        ('3.14', '–', '0.00')
    """
    finite = as_float(value)
    if not math.isfinite(finite):
        return MISSING
    text = f"{finite:.{digits}f}"
    text = text.lstrip("-") if float(text) == 0 else text
    return text.replace("-", "−")


def signed(value: object, digits: int = 2) -> str:
    """Format a finite number with an explicit sign."""
    text = number(value, digits)
    return text if text[0] in "−–" or not float(text) else "+" + text


def percent(share: object, digits: int = 0) -> str:
    """Format a fraction as a percentage.

    Example:
        >>> percent(0.386)
        '39 %'
    """
    text = number(as_float(share) * 100, digits)
    return text if text == MISSING else text + " %"


def signed_percent(share: object, digits: int = 0) -> str:
    """Format a relative change as a signed percentage."""
    text = signed(as_float(share) * 100, digits)
    return text if text == MISSING else text + " %"


def loss_percent(ratio: object) -> str:
    """Format a ratio of perplexities as a relative change, without decimals beyond +100 %.

    Example:
        >>> loss_percent(1.0474), loss_percent(3.4196)
        ('+4.7 %', '+242 %')
    """
    change = as_float(ratio) - 1.0
    return signed_percent(change, 1 if abs(change) < 1.0 else 0)


def p_value(value: object) -> str:
    """Format a p-value with three decimals; small ones with more, or as powers of ten.

    Example:
        >>> p_value(0.0321), p_value(0.00049), p_value(2.4e-9)
        ('0.032', '0.0005', '2e−9')
    """
    p = as_float(value)
    if not math.isfinite(p):
        return MISSING
    if p >= 0.0001:
        return f"{p:.3f}" if p >= 0.001 else f"{p:.4f}"
    if p <= 0:
        return "< 1e−300"
    mantissa, exponent = f"{p:.0e}".split("e")
    return f"{mantissa}e−{abs(int(exponent))}"


def interval(low: object, high: object, digits: int = 2) -> str:
    """Format an interval, or a dash if an end is missing."""
    ends = number(low, digits), number(high, digits)
    return MISSING if MISSING in ends else f"[{ends[0]}, {ends[1]}]"


def as_float(value: object) -> float:
    """Convert a value of JSON or a table to float; NaN if it isn't a number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def listed(items: Iterable[str]) -> str:
    """Join items as in a sentence.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    parts = list(items)
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"
